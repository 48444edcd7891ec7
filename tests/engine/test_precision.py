import pytest
import torch

from gradfn.engine.precision import EPS, features_of, multiplying, products_of
from gradfn.errors import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.mark.parametrize(
    ("device", "features", "products"),
    [
        (CUDA, {"tf32"}, "tf32"),
        (CPU, {"amx_tile", "amx_bf16", "amx_fp16", "avx512_bf16"}, "tf32"),
        (CPU, {"amx_tile", "amx_bf16"}, "bf16"),
        (CPU, {"avx2", "avx512_f", "avx512_bf16"}, "bf16"),
    ],
)
def test_tf32_takes_the_finest_units_that_a_device_has(device, features, products):
    assert products_of("tf32", device, features) == products


@pytest.mark.parametrize(
    ("device", "features"),
    [
        (CPU, set()),
        (CPU, {"avx2", "avx512_f", "avx512_vnni"}),
        (CPU, {"tf32"}),  # a feature of another kind of device
        (CUDA, set()),
        (CUDA, {"avx512_bf16"}),
        (torch.device("mps"), {"tf32", "amx_bf16"}),
    ],
)
def test_a_device_without_such_units_is_refused(device, features):
    with pytest.raises(InputError, match=f"and {device} has none of them: use fp32$"):
        products_of("tf32", device, features)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp64"])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_other_precisions_multiply_float32_exactly(precision, device):
    assert products_of(precision, device, {"tf32", "amx_bf16"}) == "ieee"


def test_what_a_cpu_says_of_itself():
    known = torch.cpu.get_capabilities()
    assert features_of(CPU) == {name for name in known if known[name] is True}
    assert features_of(torch.device("meta")) == set()


def test_roundings_are_those_of_the_formats():
    assert EPS["ieee"] == torch.finfo(torch.float32).eps
    assert EPS["bf16"] == torch.finfo(torch.bfloat16).eps
    assert EPS["tf32"] == torch.finfo(torch.float16).eps  # as many digits, with more exponents


def flags(device):
    if device.type == "cuda":
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    return torch.backends.mkldnn.matmul.fp32_precision, torch.backends.mkldnn.conv.fp32_precision


@pytest.mark.parametrize(
    ("device", "products"), [(CUDA, "tf32"), (CUDA, "ieee"), (CPU, "bf16"), (CPU, "tf32")]
)
def test_flags_are_set_for_the_time_of_the_run_and_put_back(device, products):
    other = CPU if device is CUDA else CUDA
    before, beside = flags(device), flags(other)
    with multiplying(products, device):
        assert flags(device) == (products, products)
        assert flags(other) == beside
        with multiplying("ieee", device):
            assert flags(device) == ("ieee", "ieee")
        assert flags(device) == (products, products)
    assert flags(device) == before
    with pytest.raises(KeyError), multiplying(products, device):
        raise KeyError
    assert flags(device) == before


def test_factors_are_rounded_where_the_cpu_has_the_units():
    if not features_of(CPU) & {"amx_bf16", "avx512_bf16"}:
        pytest.skip("this CPU has no bf16 units")
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    with multiplying("bf16", CPU):
        rounded = a @ b
    wanted = [a.bfloat16().double() @ b.bfloat16().double()]
    if "amx_bf16" not in features_of(CPU):  # with AVX512-BF16 alone oneDNN need not round
        wanted.append(a.double() @ b.double())
    assert min(float((rounded - exact).norm() / exact.norm()) for exact in wanted) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_factors_are_rounded_on_cuda():
    products = products_of("tf32", CUDA)
    a, b = torch.randn(2, 512, 512, device="cuda").unbind()
    exact = a.double() @ b.double()
    with multiplying(products, CUDA):
        rounded = (a @ b - exact).norm() / exact.norm()
    with multiplying("ieee", CUDA):
        plain = (a @ b - exact).norm() / exact.norm()
    assert plain < 1e-6 < 1e-5 < rounded < EPS["tf32"]
