"""Polynomials in a value x, its row moments, and other values of the program: how the mean's disappearance is proven.

Let x be an array and A some of its axes, n the number of entries along A. Write M1 = sum_A x and M2 = sum_A x^2. A shift
x -> x + s, where s does not vary along A, sends
    x -> x + s,    M1 -> M1 + n s,    M2 -> M2 + 2 s M1 + n s^2,
and leaves every other value alone. So x - M1/n, and both forms of the variance, M2/n - (M1/n)^2 and sum_A (x - M1/n)^2 / n,
are *identically* unchanged, which is a finite computation with these polynomials: no pattern is matched.

A polynomial is {monomial: coefficient}; a monomial is a sorted tuple of symbols. Symbols are small integers: X, M1, M2, S, and
from `FIRST` on the names of other values, numbered by the caller, who also says which of them vary along A.
"""

from __future__ import annotations

from collections.abc import Callable

X, M1, M2, S = range(4)
FIRST = 8

Monomial = tuple[int, ...]
Poly = dict[Monomial, float]

MOST_TERMS, HIGHEST_DEGREE = 200, 8
EXACT = 1e-13
"""Coefficients that cancel up to this, relatively, are those of exact numbers, such as n and 1/n in float64."""
ROUNDED = 2e-6
"""The same where numbers were rounded to float32: there, 1/n is a literal of that width in some programs."""


def constant(value: float) -> Poly:
    """The polynomial of a number."""
    return {(): value} if value != 0.0 else {}


def symbol(name: int) -> Poly:
    """The polynomial of one symbol."""
    return {(name,): 1.0}


def add(left: Poly, right: Poly, sign: float = 1.0, tolerance: float = EXACT) -> Poly:
    """left + sign * right; terms that cancel up to rounding are dropped."""
    total = dict(left)
    for monomial, value in right.items():
        old = total.get(monomial, 0.0)
        new = old + sign * value
        if abs(new) <= tolerance * max(abs(old), abs(value)):
            total.pop(monomial, None)
        else:
            total[monomial] = new
    return total


def multiply(left: Poly, right: Poly, tolerance: float = EXACT) -> Poly | None:
    """left * right, or None where it grows beyond what a normalization needs."""
    if len(left) * len(right) > MOST_TERMS:
        return None
    total: Poly = {}
    for a, va in left.items():
        for b, vb in right.items():
            if len(a) + len(b) > HIGHEST_DEGREE:
                return None
            total = add(total, {tuple(sorted(a + b)): va * vb}, tolerance=tolerance)
    return total


def total_over_axes(
    poly: Poly, n: int, varies: Callable[[int], bool], name_sum: Callable[[Monomial], int], tolerance: float = EXACT
) -> Poly | None:
    """The sum over A, where `varies` tells which other values vary along A; None if it is no polynomial of ours.

    `name_sum` names the sum over A of a product of such values.
    """
    total: Poly = {}
    summed: Monomial
    for monomial, value in poly.items():
        power = monomial.count(X)
        inside = tuple(m for m in monomial if m >= FIRST and varies(m))
        outside = tuple(m for m in monomial if m != X and m not in inside)
        if inside and power:
            return None
        if inside:
            summed, factor = (name_sum(inside),), 1.0
        elif power == 0:
            summed, factor = (), float(n)
        elif power <= 2:
            summed, factor = ((M1,) if power == 1 else (M2,)), 1.0
        else:
            return None
        total = add(total, {tuple(sorted(outside + summed)): value * factor}, tolerance=tolerance)
    return total


def change(poly: Poly, n: int, tolerance: float = EXACT) -> Poly | None:
    """What a shift by s adds to the polynomial: {} exactly if it is unchanged. None if too large to say."""
    images: dict[int, Poly] = {
        X: {(X,): 1.0, (S,): 1.0},
        M1: {(M1,): 1.0, (S,): float(n)},
        M2: {(M2,): 1.0, (M1, S): 2.0, (S, S): float(n)},
    }
    total: Poly = {}
    for monomial, value in poly.items():
        image: Poly = {tuple(m for m in monomial if m >= FIRST): value}
        for m in monomial:
            if m < FIRST:
                product = multiply(image, images[m], tolerance)
                if product is None:
                    return None
                image = product
        total = add(total, image, tolerance=tolerance)
    return add(total, poly, -1.0, tolerance)


def is_row_shift(difference: Poly, varies: Callable[[int], bool]) -> bool:
    """Whether a change is s times something that does not vary along A and does not itself depend on s or x."""
    return all(
        monomial.count(S) == 1 and X not in monomial and not any(m >= FIRST and varies(m) for m in monomial)
        for monomial in difference
    )


def is_centered(poly: Poly, n: int, tolerance: float = EXACT) -> bool:
    """Whether the polynomial is x - M1/n, up to a number."""
    scale = poly.get((X,), 0.0)
    if scale == 0.0 or set(poly) != {(X,), (M1,)}:
        return False
    return abs(poly[(M1,)] * n + scale) <= tolerance * abs(scale)
