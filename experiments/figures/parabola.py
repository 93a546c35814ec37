"""Figures 6 and 15: the sketches, drawn from a real quadratic, with the equations beside them checked on it.

Near a minimum L = a (w - b)^2 + c (eq. 12). On random a, b, c and w, JAX's derivatives give eqs. 13-15; the radius of
curvature (eq. 16, from eqs. 9 and 15) is checked against geometry, the circle through three neighbouring points of the
curve; and the decrease of eq. 7, lr g^2, against the loss itself, from which a second-order term a (lr g)^2 parts it.
"""

import functools

import jax
import numpy as np

from experiments import plots
from experiments.figures import statistics
from experiments.figures.base import Claim, Figure

NUMBER = 200
SHOWN = {"a": 0.5, "b": 1.0, "c": 0.3, "w": 2.6, "lr": 0.7}


def parabola(w, a, b, c):
    """Eq. 12."""
    return a * (w - b) ** 2 + c


def measure(a, b, c, w, lr) -> dict[str, float]:
    """Derivatives by JAX, and what eqs. 13-16 and 7 say they are."""
    g, curvature = float(jax.grad(parabola)(w, a, b, c)), float(jax.grad(jax.grad(parabola))(w, a, b, c))
    return {
        **{"a": a, "b": b, "c": c, "w": w, "lr": lr},
        **{"gradient": g, "eq13": 2 * a * (w - b), "curvature": curvature, "eq15": g / (w - b)},
        **{"radius": circle(w, functools.partial(parabola, a=a, b=b, c=c))},
        **{"eq16": abs((w - b) * (1 + g**2) ** 1.5 / g), "eq17": abs(w / g)},
        **{"decrease": parabola(w, a, b, c) - parabola(w - lr * g, a, b, c), "eq7": lr * g**2},
    }


def circle(w: float, curve, step: float = 1e-3) -> float:
    """Radius of the circle through three neighbouring points of a curve: the product of the sides over 4 areas."""
    points = [np.array([x, curve(x)]) for x in (w - step, w, w + step)]
    first, second = points[1] - points[0], points[2] - points[0]
    sides = [np.linalg.norm(points[i] - points[j]) for i, j in ((0, 1), (1, 2), (0, 2))]
    return float(np.prod(sides) / (2 * abs(first[0] * second[1] - first[1] * second[0])))


def error(rows, name, reference):
    """The largest relative error of a column."""
    return max(abs(row[name] / row[reference] - 1) for row in rows)


class Parabola(Figure):
    """The parabola that is drawn, and random ones."""

    def rows(self, place, trained):
        yield measure(**SHOWN)
        rng = np.random.default_rng(0)
        for _ in range(NUMBER):
            a, distance = np.exp(rng.uniform(-2, 1)), rng.choice([-1, 1]) * rng.uniform(0.1, 2)
            b, c, lr = rng.normal(), rng.normal(), rng.uniform(0.01, 0.1) / a
            yield measure(*map(float, (a, b, c, b + distance, lr)))

    def settings(self, place):
        return f"{NUMBER} random parabolas; drawn: " + ", ".join(f"{k} = {value}" for k, value in SHOWN.items()) + "."

    def draw(self, axes, rows):
        [panel], row = axes, rows[0]
        x = np.linspace(-1.8, 3.8, 200)
        panel.plot(x, parabola(x, row["a"], row["b"], row["c"]), color="#0072b2", label="L = a (w - b)² + c")
        self.sketch(panel, *(row[name] for name in ("a", "b", "c", "w", "gradient")), row)
        panel.plot([row["b"]], [row["c"]], "*", color="#009e73", markersize=11, label="minimum")
        plots.name_axes(panel, "parameter w", "loss L")


class Strides(Parabola):
    """A step on the parabola: eq. 7 is the decrease to first order, short of a (lr g)^2 exactly."""

    number, title = 6, "Minimum, gradient, parameter stride and loss stride"
    claim = "A step lowers the loss by lr g²."

    def judge(self, rows):
        worst = max(abs((r["eq7"] - r["a"] * (r["lr"] * r["gradient"]) ** 2) / r["decrease"] - 1) for r in rows)
        first = error([r for r in rows if r["lr"] * r["a"] < 0.03], "eq7", "decrease")
        small, exactly = f"largest relative error {first:.1%} for lr < 0.06 / curvature", statistics.exactly
        less = "The loss falls by lr g² (eq. 7) less a (lr g)²."
        return [
            Claim(less, f"largest relative error {worst:.1e}", exactly(worst, 1e-3)),
            Claim("Eq. 7 alone is the decrease where lr is small.", small, exactly(first, 0.05)),
        ]

    def sketch(self, panel, a, b, c, w, g, row):
        """Before and after the step, the tangent, and both strides."""
        after, height = w - row["lr"] * g, parabola(w, a, b, c)
        landed = parabola(after, a, b, c)
        panel.plot([w], [height], "o", color="black", label="before the step")
        panel.plot([after], [landed], "s", color="black", label="after it")
        tangent = [height - row["lr"] * g**2, height]
        panel.plot([after, w], tangent, "--", color="#d55e00", label=f"tangent, slope g = {g:.2f}")
        panel.annotate("", (after, height), (w, height), arrowprops={"arrowstyle": "->"})
        panel.annotate("", (after, landed), (after, height), arrowprops={"arrowstyle": "->"})
        for y, text in ((height, "parameter stride lr g"), ((landed + height) / 2, "loss stride")):
            panel.text(after - 0.05, y, text, ha="right", va="center", fontsize=9)


class Geometry(Parabola):
    """The circle of curvature: eqs. 13-16 are identities; eq. 17 is not."""

    number, title = 15, "The geometry near a minimum"
    claim = "Near a minimum the loss is a parabola, whose radius of curvature is eq. 16."

    def judge(self, rows):
        worst = max(error(rows, "eq13", "gradient"), error(rows, "eq15", "curvature"))
        radius, ratios = error(rows, "eq16", "radius"), [row["eq17"] / row["radius"] for row in rows]
        low, high = np.quantile(ratios, [0.05, 0.95])
        near = "Eq. 17, which puts the minimum at zero, is within a factor of ten of one parameter's radius."
        most = f"90 % of {len(ratios)} random parabolas have eq. 17 / radius in [{low:.2g}, {high:.2g}]"
        circle = "Eq. 16 is the radius of curvature, that of the circle through three neighbouring points."
        words, exactly = "largest relative error", statistics.exactly
        return [
            Claim("Eqs. 13-15 hold on a parabola.", f"{words} {worst:.1e}", exactly(worst, 1e-4)),
            Claim(circle, f"{words} {radius:.1e}", exactly(radius, 1e-3)),
            Claim(near, most, statistics.HELD if low > 0.1 and high < 10 else statistics.FAILED),
        ]

    def sketch(self, panel, a, b, c, w, g, row):
        """The circle of curvature in the point w."""
        height, radius = parabola(w, a, b, c), row["radius"]
        centre = np.array([w, height]) + radius * np.array([-g, 1]) / np.hypot(g, 1)
        angles = np.linspace(0, 2 * np.pi, 400)
        x, y = centre[0] + radius * np.cos(angles), centre[1] + radius * np.sin(angles)
        panel.plot(x, y, "--", color="#d55e00", label=f"circle of curvature, R = {radius:.2f}")
        panel.plot([w], [height], "o", color="black", label=f"w; eq. 17 says |w / g| = {row['eq17']:.2f}")
        panel.set(xlim=(-2.2, 4.2), ylim=(-0.2, 4.5))
        panel.set_aspect("equal")


FIGURES = (Strides(), Geometry())
