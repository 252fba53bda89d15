"""What the kernels share: layouts, codes, normal numbers, activations. The only file besides them that needs
Triton.

Layout: a "main array" is (B, K, H, W), contiguous either as NCHW or as channels_last. A program has BLOCK
pixels of one sample and walks over their BLOCK x K elements in K parts of BLOCK elements that lie side by
side in memory, in either layout; so each access of a main array is one of 16 bytes a thread, and only the map
from element to (pixel, channel) differs. Offsets inside a sample are 32-bit, the sample's own offset is
64-bit. Arithmetic is float32 throughout.
"""

import functools

import torch
import triton
import triton.language as tl

PTX = tl.constexpr(not triton.knobs.runtime.interpret)


# ------------------------------------------------------------------------------------------------------------
# Device functions


@triton.jit
def part(j, p0, HW, K: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr):
    """Part j of a block that starts at pixel p0: element, pixel, channel and whether it exists, each
    (BLOCK,)."""
    i = tl.arange(0, BLOCK)
    if LAST:
        e = p0 * K + j * BLOCK + i
        return e, e // K, e % K, e < HW * K
    else:
        p = p0 + i
        return j * HW + p, p, tl.zeros_like(p) + j, p < HW


@triton.jit
def cell_of(x, K: tl.constexpr):
    """A cell of K bits in int32, of any integer type; -1 for all that is none."""
    cell = x.to(tl.int32)
    return tl.where((cell == x) & (cell >> K == 0), cell, -1)


@triton.jit
def code_of(cell, codes_ptr, inside, K: tl.constexpr, TABLE: tl.constexpr):
    """The palette's code of a cell; 2D Gray unless TABLE: g(row) << K/2 | g(column), both halves at once."""
    if TABLE:
        return tl.load(codes_ptr + cell, mask=inside & (cell >= 0), other=0).to(tl.int32)
    else:
        return cell ^ ((cell >> 1) & ~(1 << (K // 2 - 1)))  # no bit of the row crosses into the column


@triton.jit
def signed(x, code, channel):
    """x (float32) where that bit of the code is 1, -x where it is 0, in two instructions."""
    flip = (~code << (31 - channel)) & -2147483648
    return (x.to(tl.int32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)


# PTX's approximations, one instruction each where Triton's are 3 to 20; errors by PTX's manual. Triton's
# interpreter has none of them.


@triton.jit
def approximate(x, INSTRUCTION: tl.constexpr):
    return tl.inline_asm_elementwise(INSTRUCTION, "=f,f", [x], tl.float32, True, 1)


@triton.jit
def exp2(x):
    """2^x: 2 units in the last place; 0 below 2^-126."""
    return approximate(x, "ex2.approx.ftz.f32 $0, $1;") if PTX else tl.exp2(x)


@triton.jit
def log2(x):
    """log2 x: 2^-22, absolute between 0.5 and 2, else relative."""
    return approximate(x, "lg2.approx.ftz.f32 $0, $1;") if PTX else tl.log2(x)


@triton.jit
def reciprocal(x):
    """1 / x: 1 unit in the last place; 0 of infinity."""
    return approximate(x, "rcp.approx.ftz.f32 $0, $1;") if PTX else 1.0 / x


@triton.jit
def square_root(x):
    """The root of x: 2^-23, relative."""
    return approximate(x, "sqrt.approx.ftz.f32 $0, $1;") if PTX else tl.sqrt(x)


@triton.jit
def sin(x):
    """Of x in [-pi, pi]: 2^-20, absolute."""
    return approximate(x, "sin.approx.ftz.f32 $0, $1;") if PTX else tl.sin(x)


@triton.jit
def cos(x):
    """Of x in [-pi, pi]: 2^-20, absolute."""
    return approximate(x, "cos.approx.ftz.f32 $0, $1;") if PTX else tl.cos(x)


@triton.jit
def doubt(x):
    """1 / (1 + e^(2 x)) = (1 - tanh x) / 2: how far tanh x is from 1, without the cancellation."""
    return reciprocal(1.0 + exp2(x * 2.8853900817779268))  # 2 log2 e


@triton.jit
def tanh(x):
    e = exp2(-2.8853900817779268 * tl.abs(x))
    y = (1.0 - e) * reciprocal(1.0 + e)
    return tl.where(x >= 0, y, -y)


@triton.jit
def x_hat_of(out, xt, alpha, sigma, PREDICTION: tl.constexpr, TANH: tl.constexpr):
    """x_hat from the network's output, float32. Only an x-prediction is activated."""
    if PREDICTION == "x":
        x = tanh(out) if TANH else out
    elif PREDICTION == "eps":
        x = (xt - sigma * out) / alpha
    else:
        x = alpha * xt - sigma * out
    return x


@triton.jit
def philox(seed, c0, c1):
    """Philox4x32-10 (Salmon et al. 2011) with key `seed` (64 bits) and counter (c0, c1, 0, 0): four uint32
    words.

    tl.philox gives the same words; its two 32-bit products (low, high) are one 64-bit product here, one
    instruction.
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c2, c3 = c0 * 0, c0 * 0
    for _ in range(10):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, b.to(tl.uint32)
        c2, c3 = (a >> 32).to(tl.uint32) ^ c3 ^ k1, a.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def unit(word):
    """A random 32-bit word as a float32 in (0, 1]."""
    return (word.to(tl.float32) + 1.0) * 2.3283064365386963e-10  # 2^-32


@triton.jit
def radians(word):
    """2 pi word / 2^32, less a whole turn from half a turn on: in [-pi, pi]."""
    return word.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-9  # pi / 2^31


@triton.jit
def sin_cos_turns(word):
    """sin and cos of 2 pi word / 2^32, float32: the nearest quarter turn, and a polynomial on [-pi/4,
    pi/4]."""
    quarter = (word + 0x20000000) >> 30  # wraps around: 4 is 0
    rest = radians(word - (quarter << 30))
    z = rest * rest
    s = rest + rest * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    c = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2
                                 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    odd = (quarter & 1) != 0
    a, b = tl.where(odd, c, s), tl.where(odd, s, c)
    return tl.where(quarter >= 2, -a, a), tl.where((quarter == 1) | (quarter == 2), -b, b)


@triton.jit
def four_normals(seed, stream, call, ROUGH: tl.constexpr = False):
    """Philox4x32-10, key: the sample's 64-bit seed, counter: (call, stream, 0, 0); Box-Muller. Four float32.

    ROUGH: for numbers that are rounded to 16 bits: to within 6e-4, most to within 3e-6.
    """
    call = call.to(tl.uint32, bitcast=True)
    a, b, c, d = philox(seed, call, call * 0 + stream.to(tl.uint32, bitcast=True))
    if ROUGH:
        # 2 ln 2; the logarithm of 1 may be above 0
        r1 = square_root(tl.maximum(-1.3862943611198906 * log2(unit(a)), 0.0))
        r2 = square_root(tl.maximum(-1.3862943611198906 * log2(unit(c)), 0.0))
        angle1, angle2 = radians(b), radians(d)
        sin1, cos1, sin2, cos2 = sin(angle1), cos(angle1), sin(angle2), cos(angle2)
    else:
        r1, r2 = tl.sqrt(-2 * tl.log(unit(a))), tl.sqrt(-2 * tl.log(unit(c)))
        sin1, cos1 = sin_cos_turns(b)
        sin2, cos2 = sin_cos_turns(d)
    return r1 * cos1, r1 * sin1, r2 * cos2, r2 * sin2


@triton.jit
def normals(seed, stream, j, p0, K: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr):
    """The noise of part j of a block, (BLOCK,): number p K + c of a sample is lane (p K + c) % 4 of call (p K
    + c) // 4."""
    g = tl.arange(0, BLOCK // 4)
    if LAST:
        a, b, c, d = four_normals(seed, stream, (p0 * K + j * BLOCK) // 4 + g)
    else:  # 4 pixels share K calls; the compiler merges equal ones
        g = (p0 // 4 + g) * K
        a = four_normals(seed, stream, g + j // 4)[j % 4]
        b = four_normals(seed, stream, g + (j + K) // 4)[(j + K) % 4]
        c = four_normals(seed, stream, g + (j + 2 * K) // 4)[(j + 2 * K) % 4]
        d = four_normals(seed, stream, g + (j + 3 * K) // 4)[(j + 3 * K) % 4]
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def quarters(x):
    """(N, 4) -> its 4 columns, each (N,), as a tuple."""
    a, b = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))  # even and odd columns
    a0, a1 = tl.split(a)
    b0, b1 = tl.split(b)
    return a0, b0, a1, b1


@triton.jit
def take_apart(x, V: tl.constexpr):
    """(N, V) -> its V columns, each (N,), as a tuple; V is 1, 2, 4 or 8. Triton 3.4 bears no recursion."""
    if V == 1:
        return (tl.reshape(x, (x.shape[0],)),)
    elif V == 2:
        a, b = tl.split(x)
        return a, b
    elif V == 4:
        return quarters(x)
    else:
        a, b = tl.split(tl.reshape(x, (x.shape[0], 4, 2)))
        a, b = quarters(a), quarters(b)
        return a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3]


@triton.jit
def put_together(xs, V: tl.constexpr):
    """A tuple of V vectors (N,) -> (N, V); V is 1, 2, 4 or 8."""
    if V == 1:
        x = xs[0]
    elif V == 2:
        x = tl.join(xs[0], xs[1])
    elif V == 4:
        x = tl.join(tl.join(xs[0], xs[2]), tl.join(xs[1], xs[3]))
    else:
        x = tl.join(tl.join(tl.join(xs[0], xs[4]), tl.join(xs[2], xs[6])),
                    tl.join(tl.join(xs[1], xs[5]), tl.join(xs[3], xs[7])))
    return tl.reshape(x, (xs[0].shape[0], V))


@triton.jit
def load_rows(ptr, group, HW, C: tl.constexpr, V: tl.constexpr, LAST: tl.constexpr):
    """All C channels of V pixels a thread: V x C vectors (N,), pixel by pixel, read in C accesses of V
    elements."""
    v, parts, rows = tl.arange(0, V), (), ()
    for j in tl.static_range(C):
        e = group[:, None] * (V * C) + j * V + v[None, :] if LAST else group[:, None] * V + v[None, :]
        x = tl.load(ptr + e, mask=e < HW * C, other=0) if LAST else tl.load(ptr + j * HW + e, mask=e < HW,
                                                                            other=0)
        parts = parts + take_apart(x, V)
    if LAST:
        rows = parts
    else:
        for i in tl.static_range(V * C):
            rows = rows + (parts[i % C * V + i // C],)
    return rows


@triton.jit
def store_rows(ptr, rows, group, HW, C: tl.constexpr, V: tl.constexpr, LAST: tl.constexpr):
    """The reverse of load_rows."""
    v = tl.arange(0, V)
    for j in tl.static_range(C):
        column = ()
        for i in tl.static_range(V):
            column = column + (rows[j * V + i if LAST else i * C + j],)
        x = put_together(column, V).to(ptr.dtype.element_ty)
        if LAST:
            e = group[:, None] * (V * C) + j * V + v[None, :]
            tl.store(ptr + e, x, mask=e < HW * C)
        else:
            e = group[:, None] * V + v[None, :]
            tl.store(ptr + j * HW + e, x, mask=e < HW)


# ------------------------------------------------------------------------------------------------------------
# Host


def operator(launcher):
    """A launcher as the operator bitseg::<its name>. It runs on the device of its first tensor: Triton
    launches on the current one, wherever the tensors are. A copy of this folder by another name has operators
    of its own."""
    @functools.wraps(launcher)
    def there(*given, **options):
        first = next(x for x in (*given, *options.values()) if isinstance(x, torch.Tensor))
        with torch.cuda.device_of(first):
            return launcher(*given, **options)

    home = "bitseg" if __package__ == "kernels" else "bitseg_" + __package__.replace(".", "_")
    return torch.library.custom_op(f"{home}::{launcher.__name__}", mutates_args=())(there)


def once():
    """Called in a backward pass: its result is no function that could be differentiated again."""
    if torch.is_grad_enabled():
        raise RuntimeError("the kernels are differentiable once: without create_graph, or with plain PyTorch "
                           "(kernels.use('torch'))")


def is_last(x):
    """Whether x (B, K, H, W) is channels_last in memory; a one-channel or one-pixel array counts as NCHW."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense(x):
    """x itself if it is contiguous in one of the two layouts, else a copy in NCHW."""
    return x if is_last(x) else x.contiguous()


def like(x, last):
    """x in the layout that the other main arrays have: itself, or a copy."""
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def empty(shape, last, dtype, device):
    return torch.empty(shape, dtype=dtype, device=device,
                       memory_format=torch.channels_last if last else torch.contiguous_format)
