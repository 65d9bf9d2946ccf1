"""Slow, literal implementations that the tests hold the real code against.

Nothing here imports the product, and nothing here shares its algorithms: packing goes bit by bit,
grids are searched one row at a time, and the solve is Optimal Brain Quantization as published, with
a fresh matrix inverse for every column. Everything is float64 numpy.
"""

from dataclasses import dataclass

import numpy as np

HALF_TINY, HALF_MAX = 2.0**-24, 65504.0  # least subnormal and largest finite float16
FACTORS = np.arange(104, 58, -2) / 100

# --- packing ------------------------------------------------------------------------------------


def pack_bits(values: list[int], bits: int) -> list[int]:
    """One column as unsigned 32-bit words: bit b of value k is bit k*bits+b of the stream."""
    stream = [value >> b & 1 for value in values for b in range(bits)]
    stream += [0] * (-len(stream) % 32)
    words = []
    for start in range(0, len(stream), 32):
        words.append(sum(bit << i for i, bit in enumerate(stream[start : start + 32])))
    return words


def unpack_bits(words: list[int], bits: int, n: int) -> list[int]:
    """The first n values of a column of unsigned 32-bit words."""
    stream = [word >> i & 1 for word in words for i in range(32)]
    return [sum(stream[k * bits + b] << b for b in range(bits)) for k in range(n)]


def signed(word: int) -> int:
    """The int32 with the bits of an unsigned 32-bit word."""
    return word - 2**32 if word >= 2**31 else word


def pack_columns(values: np.ndarray, bits: int) -> np.ndarray:
    """(n, m) integers -> (ceil(n*bits/32), m) int32, a column at a time."""
    n_words = -(-values.shape[0] * bits // 32)
    words = np.zeros((n_words, values.shape[1]), dtype=np.int32)
    for column in range(values.shape[1]):
        packed = pack_bits([int(v) for v in values[:, column]], bits)
        words[:, column] = [signed(word) for word in packed]
    return words


# --- grid ---------------------------------------------------------------------------------------


def to_half(x: float) -> float:
    """x rounded to a positive finite float16, by way of float32."""
    return float(np.float16(np.float32(min(max(x, HALF_TINY), HALF_MAX))))


def row_grid(w: np.ndarray, bits: int, sym: bool, factor: float) -> tuple[float, int]:
    """(scale, zero) of one row's group `w` (g,) with its range multiplied by `factor`."""
    maxq = 2**bits - 1
    xmin, xmax = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
    if xmin == 0.0 and xmax == 0.0:
        xmin, xmax = -1.0, 1.0
    xmin, xmax = xmin * abs(factor), xmax * abs(factor)
    if sym:
        return float(np.sign(factor)) * to_half(2 * max(-xmin, xmax) / maxq), 2 ** (bits - 1)
    scale = to_half((xmax - xmin) / maxq)
    zero = round(-xmin / scale)  # python rounds half to even
    if zero < 1:
        return to_half(xmax / (maxq - 1)), 1
    return scale, min(zero, maxq)


def round_on_grid(w: np.ndarray, scale: float, zero: int, bits: int) -> np.ndarray:
    """The integers of `w`, any shape."""
    return np.clip(np.rint(w / scale) + zero, 0, 2**bits - 1)


def row_error(e: np.ndarray, search: str, H: np.ndarray | None) -> float:
    """The score the scale search minimises, of one row's error `e` (g,)."""
    if search == "hessian":
        assert H is not None
        return float(e @ H @ e)
    return float(np.sum(np.abs(e) ** 2.4))


def search_row(
    w: np.ndarray, bits: int, sym: bool, search: str, H: np.ndarray | None = None
) -> tuple[float, int]:
    """(scale, zero) of one row's group `w` (g,) by exhaustive search, the first of equals kept."""
    if search == "minmax":
        return row_grid(w, bits, sym, 1.0)
    best, best_error = None, np.inf
    for factor in [*FACTORS, *(-f for f in FACTORS)] if sym else FACTORS:
        scale, zero = row_grid(w, bits, sym, float(factor))
        e = w - scale * (round_on_grid(w, scale, zero, bits) - zero)
        error = row_error(e, search, H)
        if error < best_error:
            best, best_error = (scale, zero), error
    assert best is not None
    if sym:
        return best
    scale, found = best
    for step in (-1, 1):  # the zero point's neighbours, at the scale that was found
        zero = min(max(found + step, 1), 2**bits - 1)
        e = w - scale * (round_on_grid(w, scale, zero, bits) - zero)
        error = row_error(e, search, H)
        if error < best_error:
            best, best_error = (scale, zero), error
    return best


def search_group(
    w: np.ndarray, bits: int, sym: bool, search: str, H: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(scale (out,), zero (out,)) of a group of weights w (g, out)."""
    rows = [search_row(w[:, r], bits, sym, search, H) for r in range(w.shape[1])]
    return np.array([scale for scale, _ in rows]), np.array([zero for _, zero in rows])


# --- solver -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solved:
    """What the oracle found; shapes as in Solution, loss before the RTN guard too."""

    q: np.ndarray  # (out, in)
    scales: np.ndarray  # (groups, out)
    zeros: np.ndarray  # (groups, out)
    g_idx: np.ndarray  # (in,)
    dequantized: np.ndarray  # (out, in)
    loss: np.ndarray  # (out,)
    swept_loss: np.ndarray  # (out,), of the sweep alone
    rtn_loss: np.ndarray  # (out,)


def without_dead(W: np.ndarray, H: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(W, H, mean live diagonal) with the columns that no input ever reaches made harmless."""
    W, H = W.astype(np.float64).copy(), H.astype(np.float64).copy()
    dead = np.diag(H) == 0
    mean = float(np.diag(H)[~dead].mean()) if not dead.all() else 1.0
    for j in np.flatnonzero(dead):
        for row in W:
            if not dead.all():
                bound = max(abs(weight) for weight in row[~dead])
                row[j] = min(max(row[j], -bound), bound)
        H[j, j] = mean
    return W, H, mean


def descending(keys: list[float]) -> list[int]:
    """Positions by descending key; equals stay in place (python's sort is stable)."""
    return sorted(range(len(keys)), key=lambda i: -keys[i])


def visiting_order(
    H: np.ndarray, group_size: int, order: str, static_groups: bool
) -> tuple[list[int], np.ndarray]:
    """(columns in the order they are quantized, group of each original column)."""
    n = H.shape[0]
    size = n if group_size == -1 or group_size > n else group_size
    diag = [float(d) for d in np.diag(H)]
    natural = np.arange(n) // size
    if order == "natural":
        return list(range(n)), natural
    if order == "act":
        columns = descending(diag)
        if static_groups:
            return columns, natural
        g_idx = np.empty(n, dtype=int)
        for position, column in enumerate(columns):
            g_idx[column] = position // size
        return columns, g_idx
    assert order == "gar"
    groups = [[j for j in range(n) if j // size == g] for g in range(natural.max() + 1)]
    columns = []
    for g in descending([float(np.mean([diag[j] for j in group])) for group in groups]):
        columns += [groups[g][k] for k in descending([diag[j] for j in groups[g]])]
    return columns, natural


def quadratic(e: np.ndarray, H: np.ndarray) -> np.ndarray:
    """e H e^T of each row of e (out, in)."""
    return np.array([row @ H @ row for row in e])


def obq(
    W: np.ndarray,
    H: np.ndarray,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    order: str,
    static_groups: bool,
    scale_search: str,
    percdamp: float,
) -> Solved:
    """Optimal Brain Quantization of W (out, in) for inputs with second moment H (in, in).

    Frantar and Alistarh 2022 (arXiv 2208.11580), eq. 3, in a fixed order of columns: quantize one
    weight, then move all that remain by the least-squares step of the remaining inverse Hessian.
    """
    given = H.astype(np.float64)  # a dead input costs nothing
    W, H, mean = without_dead(W, H)
    n_out, n_in = W.shape
    damped = H + percdamp * mean * np.eye(n_in)
    columns, g_idx = visiting_order(H, group_size, order, static_groups)
    n_groups = int(g_idx.max()) + 1
    scales, zeros = np.zeros((n_groups, n_out)), np.zeros((n_groups, n_out))
    q = np.zeros((n_out, n_in))
    left = W.copy()

    def set_grid(g: int, weights: np.ndarray) -> None:
        members = np.flatnonzero(g_idx == g)
        scales[g], zeros[g] = search_group(
            weights[:, members].T, bits, sym, scale_search, damped[np.ix_(members, members)]
        )

    if static_groups:
        for g in range(n_groups):
            set_grid(g, W)
    seen = set(range(n_groups)) if static_groups else set()
    for position, j in enumerate(columns):
        g = int(g_idx[j])
        if g not in seen:
            seen.add(g)
            set_grid(g, left)
        remaining = columns[position:]  # j first
        inverse = np.linalg.inv(damped[np.ix_(remaining, remaining)])
        for r in range(n_out):
            q[r, j] = round_on_grid(left[r, j], scales[g, r], int(zeros[g, r]), bits)
            error = left[r, j] - scales[g, r] * (q[r, j] - zeros[g, r])
            left[r, remaining] -= error / inverse[0, 0] * inverse[0]

    def on_grid(integers: np.ndarray) -> np.ndarray:
        return scales[g_idx].T * (integers - zeros[g_idx].T)

    rounded = np.zeros_like(q)
    for r in range(n_out):
        for j in range(n_in):
            g = g_idx[j]
            rounded[r, j] = round_on_grid(W[r, j], scales[g, r], int(zeros[g, r]), bits)
    swept_loss = quadratic(W - on_grid(q), given)
    rtn_loss = quadratic(W - on_grid(rounded), given)
    kept = rtn_loss < swept_loss
    q = np.where(kept[:, None], rounded, q)
    loss = np.where(kept, rtn_loss, swept_loss)
    return Solved(q, scales, zeros, g_idx, on_grid(q), loss, swept_loss, rtn_loss)


def rtn(
    W: np.ndarray, H: np.ndarray, *, bits: int, group_size: int, sym: bool, scale_search: str
) -> Solved:
    """Plain rounding of W (out, in) on natural groups."""
    given = H.astype(np.float64)
    W, H, _ = without_dead(W, H)
    n_out, n_in = W.shape
    _, g_idx = visiting_order(H, group_size, "natural", True)
    n_groups = int(g_idx.max()) + 1
    scales, zeros = np.zeros((n_groups, n_out)), np.zeros((n_groups, n_out))
    q = np.zeros((n_out, n_in))
    for g in range(n_groups):
        m = np.flatnonzero(g_idx == g)
        scales[g], zeros[g] = search_group(W[:, m].T, bits, sym, scale_search, H[np.ix_(m, m)])
        for r in range(n_out):
            q[r, m] = round_on_grid(W[r, m], scales[g, r], int(zeros[g, r]), bits)
    dequantized = scales[g_idx].T * (q - zeros[g_idx].T)
    loss = quadratic(W - dequantized, given)
    return Solved(q, scales, zeros, g_idx, dequantized, loss, loss, loss)
