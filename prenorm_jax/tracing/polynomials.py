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

import numpy as np

X, M1, M2, S = range(4)
FIRST = 8

Monomial = tuple[int, ...]
Poly = dict[Monomial, float]

MOST_TERMS, HIGHEST_DEGREE, LARGEST_MULTIPLE = 200, 8, 16
TOLERANCE = 1e-12


def constant(value: float) -> Poly:
    """The polynomial of a number."""
    return {(): value} if value != 0.0 else {}


def unrounded(number: float, n: int) -> float:
    """The small multiple of 1/n (or 1/(n - 1), for an unbiased variance) that a float32 number is the rounding of, or the number itself.

    >>> import numpy as np
    >>> unrounded(float(np.float32(1 / 3)), 3) == 1 / 3, unrounded(float(np.float32(1.0000001)), 3) == 1.0
    (True, False)
    """
    if float(np.float32(number)) != number:
        return number
    for d in (n, n - 1, n * n, n * (n - 1)):
        exact = round(number * d) / d if d else 0.0
        small, rounded = 0 < abs(exact * d) <= LARGEST_MULTIPLE, float(np.float32(exact)) != exact
        if small and rounded and abs(exact - number) <= 2.0**-23 * abs(exact):
            return exact
    return number


def symbol(name: int) -> Poly:
    """The polynomial of one symbol."""
    return {(name,): 1.0}


def add(left: Poly, right: Poly, sign: float = 1.0) -> Poly:
    """left + sign * right; terms that cancel up to rounding are dropped."""
    total = dict(left)
    for monomial, value in right.items():
        old = total.get(monomial, 0.0)
        new = old + sign * value
        if abs(new) <= TOLERANCE * max(abs(old), abs(value)):
            total.pop(monomial, None)
        else:
            total[monomial] = new
    return total


def multiply(left: Poly, right: Poly) -> Poly | None:
    """left * right, or None where it grows beyond what a normalization needs."""
    if len(left) * len(right) > MOST_TERMS:
        return None
    total: Poly = {}
    for a, va in left.items():
        for b, vb in right.items():
            if len(a) + len(b) > HIGHEST_DEGREE:
                return None
            total = add(total, {tuple(sorted(a + b)): va * vb})
    return total


def total_over_axes(
    poly: Poly, n: int, varies: Callable[[int], bool], name_sum: Callable[[Monomial], int]
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
        total = add(total, {tuple(sorted(outside + summed)): value * factor})
    return total


def change(poly: Poly, n: int) -> Poly | None:
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
                product = multiply(image, images[m])
                if product is None:
                    return None
                image = product
        total = add(total, image)
    return add(total, poly, -1.0)


def is_row_shift(difference: Poly, varies: Callable[[int], bool]) -> bool:
    """Whether a change is s times something that does not vary along A and does not itself depend on s or x."""
    return all(
        monomial.count(S) == 1 and X not in monomial and not any(m >= FIRST and varies(m) for m in monomial)
        for monomial in difference
    )


def is_centered(poly: Poly, n: int) -> bool:
    """Whether the polynomial is x - M1/n, up to a number."""
    scale = poly.get((X,), 0.0)
    if scale == 0.0 or set(poly) != {(X,), (M1,)}:
        return False
    return abs(poly[(M1,)] * n + scale) <= TOLERANCE * abs(scale)
