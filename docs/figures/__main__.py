"""Draw the figures of the documents: `python -m docs.figures` (`make figures`)."""

from importlib import import_module
from pathlib import Path

import matplotlib

FIGURES = ("mean_velocity", "packed", "quality", "search", "weights")

# the same bytes for the same figure
matplotlib.rcParams |= {"svg.hashsalt": "imf_kernels", "axes.spines.top": False}
matplotlib.rcParams |= {"axes.spines.right": False, "font.size": 10}


def main() -> None:
    for name in FIGURES:
        drawn = import_module(f"docs.figures.{name}")
        path = Path(__file__).with_name(drawn.FILE)
        drawn.draw().savefig(path, dpi=144, bbox_inches="tight", metadata=drawn.METADATA)
        print(path)


if __name__ == "__main__":
    main()
