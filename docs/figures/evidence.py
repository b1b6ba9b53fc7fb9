"""docs/explanation/without_a_gpu.md: what a kernel becomes on its way to a GPU, and what checks each form of it."""

from matplotlib.figure import Figure
from style import BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, RED, WHITE, arrow, box, canvas, label

# From above: a form of the kernel, what is run or looked at, and what that shows
LAYERS = (
    ("Triton source", BLUE, ("interpreter", "outputs and gradients: pairs of all sizes, dtypes and options"),
     ("concurrent interpreter", "programs that wait for each other, in random orders")),
    ("PTX", GREEN, ("emulator", "every access to memory, races, stores that are seen late"),
     ("mutants", "that the emulator notices what is wrong")),
    ("machine code", PURPLE, ("compiler checks", "registers, spills, where weights are loaded, what orders exchanges"),
     ("model of a step", "cycles, modelled")),
    ("launch", ORANGE, ("stand-in for libcuda", "grid, cooperative or not, shared memory, every parameter")),
    ("GPU", RED, ("make gpu", "what ptxas and the hardware do, and how fast")),
)  # fmt: skip


def evidence() -> Figure:
    figure, axes = canvas(4.75, 8.9, 5.07)
    high, y = 0.74, 4.2
    for k, (form, color, *checks) in enumerate(LAYERS):
        box(axes, 0.15, y, 1.75, high, form, facecolor=color, edgecolor=color, size=10)
        if k + 1 < len(LAYERS):
            arrow(axes, (1.02, y), (1.02, y - 0.24), GREY)
        box(axes, 2.15, y, 6.6, high, facecolor=PALE, edgecolor=WHITE)
        for line, (name, shows) in enumerate(checks):
            place = y + high / 2 + (0.19 - 0.38 * line if len(checks) == 2 else 0)
            label(axes, 2.3, place, name, ha="left", weight="bold", size=8.5)
            label(axes, 4.05, place, shows, ha="left", size=8.5)
        y -= high + 0.24
    return figure
