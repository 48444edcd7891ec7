"""Random numbers that are a function of a key: the same on every device, in every version, in any order."""

from hashlib import sha256

import numpy as np


def words(count: int, *key: object) -> np.ndarray:
    """`count` random 64-bit words of the Philox counter generator, keyed by the texts of some values.

    >>> bool((words(3, 0, "mlp") == words(5, 0, "mlp")[:3]).all())
    True
    """
    digest = sha256("\0".join(map(str, key)).encode()).digest()
    philox = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"))
    return philox.random_raw(count)  # the raw words are stable across numpy versions


def uniforms(count: int, *key: object) -> np.ndarray:
    """Numbers in (0, 1).

    >>> bool(0 < uniforms(1, "key")[0] < 1)
    True
    """
    return ((words(count, *key) >> 11).astype(np.float64) + 0.5) * 2.0**-53


def signs(count: int, *key: object) -> np.ndarray:
    """Signs, -1.0 or 1.0, a bit each.

    >>> set(signs(64, "key").tolist())
    {1.0, -1.0}
    """
    raw = words(-(-count // 64), *key).astype("<u8")
    return 2.0 * np.unpackbits(raw.view(np.uint8), bitorder="little")[:count] - 1.0


def normals(count: int, *key: object) -> np.ndarray:
    """Standard normal numbers, by Box and Muller's transform of pairs of uniform ones.

    >>> normals(3, "key").shape
    (3,)
    """
    half = -(-count // 2)
    u, v = uniforms(2 * half, *key).reshape(2, half)
    radius, angle = np.sqrt(-2.0 * np.log(u)), 2.0 * np.pi * v
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def choice(count: int, among: int, *key: object) -> np.ndarray:
    """`count` different numbers of `range(among)`, in ascending order, every set of them equally likely.

    Time and memory are those of `count` numbers, however many there are to choose from.

    >>> choice(3, 3, "key")
    array([0, 1, 2])
    """
    if 2 * count > among:
        return np.sort(words(among, *key).argsort(kind="stable")[:count])
    drawn = 2 * count
    while True:
        _, first = np.unique(words(drawn, *key) % np.uint64(among), return_index=True)
        if len(first) >= count:  # in the order drawn, numbers that are new are a sample without replacement
            return np.sort((words(drawn, *key) % np.uint64(among))[np.sort(first)[:count]].astype(np.int64))
        drawn *= 2
