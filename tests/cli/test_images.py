"""Images on the command line: the numbers of a plain loop, of files, folders and bytes; bad ones refused."""

import csv
import json
import re
import shutil
from io import BytesIO, StringIO

import datasets
import h5py
import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tiny import write_jsonl

import gradfn as gf
from gradfn.hf import load_images, load_processor, load_rows
from gradfn.shown import SAID
from gradfn.testing.models import randomize

TASK = ("--task", "image-classification")
FULL = ("--precision", "fp64", "--projection-dim", 0)
CLASSES = {"dog": 0, "cat": 1}
"""Not in the order of the alphabet, in which a folder's classes are numbered."""


def processor():
    return hf.ViTImageProcessorPil(size={"height": 8, "width": 8})


def vit(**options):
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            image_size=8, patch_size=4, hidden_size=8, intermediate_size=6, num_hidden_layers=1,
            num_attention_heads=2, label2id=CLASSES, id2label={1: "cat", 0: "dog"}, **options,
        )
    )  # fmt: skip


def resnet():
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic",
            label2id=CLASSES, id2label={1: "cat", 0: "dog"},
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images by class in a folder, and files that name them; two models with their processors."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    rows = []
    for number, name in enumerate(["cat"] * 4 + ["dog"] * 3):
        (root / "pets" / name).mkdir(parents=True, exist_ok=True)
        path = f"pets/{name}/{number}.png"
        Image.fromarray(draw.integers(0, 255, (9 + number, 11, 3), np.uint8)).save(root / path)
        rows.append({"image": path, "label": name})
    write_jsonl(root / "train.jsonl", rows)
    write_jsonl(root / "query.jsonl", [rows[1], {**rows[5], "id": "mine"}])
    for name, make in (("vit", vit), ("resnet", resnet)):
        torch.manual_seed(0)
        randomize(make(), 0, scale=0.3).float().save_pretrained(root / name)
        processor().save_pretrained(root / name)
    return root


def naive_rows(place, model, file="train.jsonl"):
    """Gradients of all linear and convolution layers, flat, one image after the other, in float64."""
    net = hf.AutoModelForImageClassification.from_pretrained(place / model, dtype=torch.float64).eval()
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    weights = [p for layer in net.modules() if isinstance(layer, kinds) for p in layer.parameters()]
    grads = []
    for line in (place / file).read_text().splitlines():
        row = json.loads(line)
        with Image.open(place / row["image"]) as image:
            pixels = processor()(image.convert("RGB"), return_tensors="pt")["pixel_values"].double()
        logits = net(pixel_values=pixels).logits[0]
        loss = logits.logsumexp(0) - logits[CLASSES[row["label"]]]
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    return torch.stack(grads)


def close(got, want, tolerance=1e-9):
    want = np.asarray(want)
    assert np.abs(np.asarray(got) - want).max() <= tolerance * np.abs(want).max()


def scores_of(run):
    """Those in a run, which are kept in float32."""
    with h5py.File(run / "scores.h5") as file:
        return file["scores"][()]


def shown(table):
    """Scores of rows by queries in an exported table, which are those of the model's precision."""
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    queries = list(dict.fromkeys(line["query"] for line in lines))
    scores = np.full((1 + max(line["row"] for line in lines), len(queries)), np.nan)
    for line in lines:
        scores[line["row"], queries.index(line["query"])] = line["score"]
    return scores


@pytest.mark.parametrize(("model", "batch"), [("vit", 4096), ("resnet", 8)])
def test_scores_equal_a_plain_loop(ok, place, tmp_path, model, batch):
    table = tmp_path / "table.jsonl"
    ask = ("score", *TASK, *FULL, "--model", place / model, "--dataset", place / "train.jsonl", "--top", 9)
    out = ok(*ask, "--query", place / "query.jsonl", "--token-batch-size", batch, "--jsonl", table)
    close(shown(table), naive_rows(place, model) @ naive_rows(place, model, "query.jsonl").T)
    assert "query 0  1.png → cat" in out
    assert "query mine  5.png → dog" in out
    assert re.search(r"proponent 1 .* \d  \d\.png → cat", out)


def test_self_influence_of_images_is_the_squared_norm(ok, place, tmp_path):
    ok("score", *TASK, "--model", place / "resnet", "--dataset", place / "pets", "--self", *FULL, "--top", 9,
       "--jsonl", tmp_path / "table.jsonl")  # fmt: skip
    close(shown(tmp_path / "table.jsonl")[:, 0], naive_rows(place, "resnet").square().sum(1))


def test_a_weight_of_a_row_multiplies_its_scores(ok, place, tmp_path):
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    write_jsonl(place / "weighed.jsonl", [{**row, "weight": n - 2.5} for n, row in enumerate(rows)])
    table = tmp_path / "table.jsonl"
    data = ("--dataset", place / "weighed.jsonl", "--advantage-column", "weight")
    ask = ("--query", place / "query.jsonl", "--top", 9, "--jsonl", table)
    ok("score", *TASK, *FULL, "--model", place / "vit", *data, *ask)
    weighed = (torch.arange(7) - 2.5)[:, None] * naive_rows(place, "vit")
    close(shown(table), weighed @ naive_rows(place, "vit", "query.jsonl").T)


def test_a_store_of_images_is_searched_and_stored_queries_scored(ok, place, tmp_path):
    data = ("--model", place / "vit", *TASK, *FULL, "--dataset")
    table = tmp_path / "table.jsonl"
    ok("build", tmp_path / "rows", *data, place / "train.jsonl")
    ok("query", tmp_path / "rows", "--query", place / "query.jsonl", "--jsonl", table, "--top", 9)
    want = naive_rows(place, "vit") @ naive_rows(place, "vit", "query.jsonl").T
    close(shown(table), want, 1e-6)
    ok("reduce", tmp_path / "mean", *data, place / "query.jsonl")
    ok("score", tmp_path / "run", *data, place / "train.jsonl", "--query-path", tmp_path / "mean")
    close(scores_of(tmp_path / "run")[:, 0], want.mean(1, keepdim=True), 1e-6)


def test_retrained_models_equal_one_step_by_hand(ok, place, tmp_path):
    ok("retrain", tmp_path / "truth", *TASK, "--model", place / "vit", "--dataset", place / "train.jsonl",
       "--query", place / "query.jsonl", "--leave-out", 1, "--epochs", 1, "--seeds", 1, "--optimizer", "sgd",
       "--learning-rate", 1e-5, "--precision", "fp64", "--batch-size", 6)  # fmt: skip
    with h5py.File(tmp_path / "truth" / "truth.h5") as file:
        losses, subsets = torch.from_numpy(file["losses"][()]), torch.from_numpy(file["subsets"][()])
    assert subsets.shape == (7, 7)
    # To first order, a step of the mean gradient of some rows changes a query's loss by minus its share.
    grads, asked = all_rows(place, "vit"), all_rows(place, "vit", "query.jsonl")
    change = -1e-5 * (subsets.double() @ grads / subsets.sum(1, keepdim=True)) @ asked.T
    close(losses - losses.mean(0), change - change.mean(0), 1e-2)


def test_scores_of_images_are_compared_with_retrained_models(ok, command, place, tmp_path):
    data = (
        *TASK,
        "--model",
        place / "vit",
        "--dataset",
        place / "train.jsonl",
        "--query",
        place / "query.jsonl",
    )
    ok("retrain", tmp_path / "truth", *data, "--subsets", 4, "--epochs", 1, "--seeds", 1, "--batch-size", 4)
    ok("score", tmp_path / "run", *data, "--method", "ekfac")
    out = ok("evaluate", "lds", tmp_path / "truth", tmp_path / "run")
    assert "4 subsets x 1 shared seed, of 7 rows" in out
    mixes = command("retrain", tmp_path / "no", *TASK, "--model", place / "resnet", *data[4:])
    assert "is a BatchNorm, which mixes the rows of a batch" in mixes.err


def all_rows(place, model, file="train.jsonl"):
    """The gradients of all parameters."""
    net = gf.load_model(place / model, task="image_classification", precision="fp64")
    data = images(place, file, net)
    loss = gf.model_loss(net, "image_classification")
    blocks = gf.collect(net, data, loss=loss, view=gf.View(include=["*"]))
    return torch.cat([block.flatten(1) for block in blocks.values()], 1)


def images(place, file, net=None, **options):
    """The images of a dataset, as `load_images` gives them."""
    net = net or gf.load_model(place / "vit", task="image_classification")
    rows = load_rows(file if file.__class__.__name__.endswith("Path") else place / file)
    return load_images(rows, load_processor(place / "vit"), net, folder=place, **options)


def write_forms(place):
    """The same rows otherwise: bytes in a Parquet file, with and without their feature; paths in a CSV."""
    lines = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    made = [{**row, "image": (place / row["image"]).read_bytes()} for row in lines]
    write_jsonl(place / "named.jsonl", [{"photo": row["image"], "kind": row["label"]} for row in lines])
    plain = datasets.Dataset.from_list(made)
    plain.to_parquet(place / "bytes.parquet")
    plain.cast_column("image", datasets.Image()).to_parquet(place / "feature.parquet")
    with open(place / "paths.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "label"])
        writer.writeheader()
        writer.writerows(lines)


def test_images_are_the_same_from_files_folders_and_bytes(place):
    write_forms(place)
    first = images(place, "train.jsonl")
    assert first.texts[5] == f"5.png{SAID}dog"
    assert first.extras["labels"].tolist() == [1] * 4 + [0] * 3
    assert first.lengths.tolist() == [4] * 7  # patches of 4 x 4
    for form in ("pets", "bytes.parquet", "feature.parquet", "paths.csv"):
        other = images(place, form)
        assert other.fingerprint() == first.fingerprint()
        assert all(
            torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(first, other, strict=True)
        )
    assert images(place, "bytes.parquet").texts[5] == f"image 5{SAID}dog"
    named = images(place, "named.jsonl", image_column="photo", label_column="kind")
    assert named.fingerprint() == first.fingerprint()


def test_an_image_that_is_replaced_during_a_run(place, tmp_path):
    copy = shutil.copytree(place, tmp_path / "copy")
    rows = images(copy, "train.jsonl")
    before = rows[3]["pixel_values"]
    shutil.copy(copy / "pets/cat/0.png", copy / "pets/cat/3.png")
    with pytest.raises(
        gf.InputError, match=r"image of row 3 \(3.png\) was replaced while it was in use: run"
    ):
        rows[3]
    assert not torch.equal(images(copy, "train.jsonl")[3]["pixel_values"], before)
    assert images(copy, "train.jsonl").fingerprint() != rows.fingerprint()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def test_postscript_is_no_image_whatever_its_name(place, tmp_path):
    copy = shutil.copytree(place, tmp_path / "copy")
    (copy / "pets/cat/0.png").write_bytes(POSTSCRIPT)
    with pytest.raises(gf.InputError, match=r"row 0 \(0.png\) cannot be made into pixels \(cannot identify"):
        images(copy, "train.jsonl")


def test_a_processor_with_code_of_its_own(command, place, tmp_path, monkeypatch):
    copy = shutil.copytree(place, tmp_path / "copy")
    config = copy / "vit/preprocessor_config.json"
    made = json.loads(config.read_text())
    made = {key: value for key, value in made.items() if "image_processor" not in key}
    auto = {"AutoImageProcessor": ["mine.Mine", None], "AutoProcessor": "mine.Mine"}
    config.write_text(json.dumps({**made, "image_processor_type": "Mine", "auto_map": auto}))
    (copy / "vit/mine.py").write_text(
        "import pathlib\nimport transformers\n"
        f"pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class Mine(transformers.ViTImageProcessorPil):\n    pass\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", StringIO("y\n" * 9))
    ask = ("build", tmp_path / "run", "--model", copy / "vit", "--dataset", copy / "train.jsonl", *TASK)
    result = command(*ask)
    assert result.status == 2
    assert "comes with code of its own: read it, then give --trust-remote-code" in result.err
    assert not (tmp_path / "ran").exists()
    command(*ask, "--trust-remote-code")
    assert (tmp_path / "ran").exists()


def test_pixels_are_what_the_processor_says(place):
    with Image.open(place / "pets/cat/2.png") as image:
        small = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR), np.float64)
    want = torch.from_numpy((small / 255 - 0.5) / 0.5).permute(2, 0, 1)
    got = images(place, "train.jsonl").select([2])[0]
    assert float((got["pixel_values"] - want).abs().max()) < 1e-6
    assert int(got["labels"]) == 1


def test_images_are_decoded_when_they_are_asked_for(place, monkeypatch):
    from gradfn.hf import images as module

    calls, decode = [], module._decoded
    monkeypatch.setattr(module, "_decoded", lambda data, mode: calls.append(1) or decode(data, mode))
    data = images(place, "train.jsonl")
    assert len(calls) == 1  # the first, on which the model is tried
    data[3], data[3]
    assert len(calls) == 3


def test_grey_palettes_and_turned_images_are_read_as_they_look(place, tmp_path):
    net = gf.load_model(place / "vit", task="image_classification")
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by a quarter clockwise
    files = {"grey.png": grey, "palette.png": grey.quantize(256), "turned.png": grey.rotate(90)}
    for name, image in files.items():
        image.save(tmp_path / name, **({"exif": turned} if name == "turned.png" else {}))
    rows = datasets.Dataset.from_list([{"image": name, "label": 0} for name in files])
    data = load_images(rows, load_processor(place / "vit"), net, folder=tmp_path)
    assert torch.equal(data[0]["pixel_values"], data[1]["pixel_values"])
    assert torch.equal(data[0]["pixel_values"], data[2]["pixel_values"])


def test_a_model_of_one_channel_reads_grey(tmp_path):
    hf.ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]
    ).save_pretrained(tmp_path)
    Image.new("RGB", (8, 8), "white").save(tmp_path / "white.png")
    rows = datasets.Dataset.from_list([{"image": "white.png", "label": 0}])
    data = load_images(rows, load_processor(tmp_path), vit(num_channels=1).eval(), folder=tmp_path)
    assert torch.equal(data[0]["pixel_values"], torch.ones(1, 8, 8))


def test_a_standard_deviation_of_zero_is_named(tmp_path):
    hf.ViTImageProcessorPil(size={"height": 8, "width": 8}, image_std=[0.0] * 3).save_pretrained(tmp_path)
    Image.new("RGB", (8, 8), "white").save(tmp_path / "white.png")
    rows = datasets.Dataset.from_list([{"image": "white.png", "label": 0}])
    with pytest.raises(gf.InputError, match=r"NaN or infinite numbers of row 0 .*mend image_std"):
        load_images(rows, load_processor(tmp_path), vit().eval(), folder=tmp_path)


def test_another_processor_is_another_thing(ok, command, place, tmp_path):
    shutil.copytree(place / "vit", tmp_path / "vit")
    data = ("--model", tmp_path / "vit", "--dataset", place / "train.jsonl", *TASK)
    ok("build", tmp_path / "run", *data)
    hf.ViTImageProcessorPil(size={"height": 8, "width": 8}, do_normalize=False).save_pretrained(
        tmp_path / "vit"
    )
    result = command("query", tmp_path / "run", "--query", place / "query.jsonl")
    assert result.status == 2
    assert re.search(r"made differently.*processor is not the same", result.err)


# --- refused


def test_an_image_that_is_cut_is_refused_when_it_is_read(place, tmp_path):
    whole = BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8)
    Image.fromarray(noise).save(whole, "jpeg")
    for name, data in {"whole.jpg": whole.getvalue(), "cut.jpg": whole.getvalue()[:-900]}.items():
        (tmp_path / name).write_bytes(data)
    rows = datasets.Dataset.from_list([{"image": name, "label": 0} for name in ("whole.jpg", "cut.jpg")])
    net = gf.load_model(place / "vit", task="image_classification")
    data = load_images(rows, load_processor(place / "vit"), net, folder=tmp_path)
    assert data[0]["pixel_values"].shape == (3, 8, 8)
    with pytest.raises(gf.InputError, match=r"row 1 \(cut.jpg\) cannot be made into pixels .*truncated"):
        data[1]


def png(width=4, **options):
    buffer = BytesIO()
    Image.new(options.get("mode", "RGB"), (width, 4)).save(buffer, "png")
    return buffer.getvalue()


BAD = [
    ({"picture": "a.png", "label": 0}, (), "no column 'image' in the dataset, which has picture, label"),
    ({"image": "a.png", "class": 0}, (), "no column 'label' in the dataset, which has image, class"),
    ({"image": "a.png", "label": 0}, ("--image-column", "no"), "no column 'no' in the dataset"),
    ({"image": "b.png", "label": 0}, (), "row 0 has the image 'b.png', but .*b.png is not a file: correct"),
    ({"image": None, "label": 0}, (), "column 'image' holds null, not images or paths: give another"),
    ({"image": 3, "label": 0}, (), "column 'image' holds int64, not images or paths: give another"),
    ({"image": "a.png", "label": "cow"}, (), "row 0 has the label 'cow', expected a number"),
    ({"image": "a.png", "label": 2}, (), "row 0 has the label 2, expected a number from 0 to 1"),
    ({"image": "text.png", "label": 0}, (), r"row 0 \(text.png\) cannot be made into pixels \(cannot"),
    ({"image": "cut.png", "label": 0}, (), r"row 0 \(cut.png\) cannot be made into pixels \("),
    ({"image": "deep.png", "label": 0}, (), r"row 0 \(deep.png\) cannot be made into pixels \(its mode"),
    ({"image": "a.png", "label": 0}, ("--by", "token"), "images have no tokens of a row: use --by example"),
    ({"image": "a.png", "label": 0}, ("--truncation",), "images are not cut, .*: leave out --truncation"),
    ({"image": "a.png", "label": 0}, ("--prompt-column", "a"), "images are no texts: leave out --prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "options", "words"), BAD)
def test_bad_images_are_refused_in_one_sentence(command, place, tmp_path, row, options, words):
    for name, data in {"a.png": png(), "text.png": b"no image", "cut.png": png(40)[:-30],
                       "deep.png": png(mode="I;16")}.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
    data = write_jsonl(tmp_path / "data.jsonl", [row])
    result = command(
        "score", tmp_path / "run", *TASK, "--model", place / "vit", "--dataset", data, "--self", *options
    )
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert re.search(words, result.err), result.err
    assert not (tmp_path / "run").exists()


def test_models_and_processors_that_do_not_fit_are_refused(command, place, tmp_path):
    shutil.copytree(place / "vit", tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    ask = ("score", *TASK, "--model", tmp_path / "vit", "--dataset", place / "train.jsonl", "--self")
    assert "holds no image processor (preprocessor_config.json)" in command(*ask).err
    hf.ViTImageProcessorPil(size={"height": 6, "width": 6}).save_pretrained(tmp_path / "vit")
    assert re.search(r"the model cannot read images of 3 x 6 x 6 numbers.*mend size and", command(*ask).err)
    hf.ViTImageProcessorPil(do_resize=False).save_pretrained(tmp_path / "vit")
    shutil.copytree(place / "resnet", tmp_path / "resnet")
    hf.ViTImageProcessorPil(do_resize=False).save_pretrained(tmp_path / "resnet")
    ask = (*ask[:4], tmp_path / "resnet", *ask[5:])
    assert re.search(
        r"makes 3 x \d+ x 11 numbers of row \d .*, but 3 x 9 x 11 of the first row", command(*ask).err
    )


def test_images_and_texts_do_not_mix(command, place, model, corpus, monkeypatch):
    ask = ("score", "--model", model, "--dataset", corpus, "--query", "a b")
    assert "--image-column is for image-classification, not for causal_lm" in command(
        *ask, "--image-column", "x"
    ).err  # fmt: skip
    asked = command("score", *TASK, "--model", place / "vit", "--dataset", place / "pets", "--query", "a b")
    assert "in --query: a text has no label, which image_classification needs" in asked.err
    monkeypatch.setattr("gradfn.hf.images.find_spec", lambda name: None)
    lost = command("score", *TASK, "--model", place / "vit", "--dataset", place / "pets", "--self")
    assert "images are read with Pillow, which is not installed: pip install 'gradfn[images]'" in lost.err
