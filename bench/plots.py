"""Draw bench/results/*.json: `plots.py RESULTS OUT.svg`, in an environment of its own that has matplotlib."""

import json
import statistics
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

RESULTS, OUT = map(Path, sys.argv[1:])
OURS, PEERS = "#c43c35", "#7a8794"


def values(name, *keys):
    """The medians of a table by (contestant, ...): `values("pinned", "of_wrk")`."""
    path, found = RESULTS / f"{name}.json", {}
    for record in json.loads(path.read_text())["records"] if path.exists() else []:
        if "error" not in record:
            row = (record["contestant"], *(record[key] for key in keys[:-1]))
            found.setdefault(row, []).append(record[keys[-1]])
    return {row: statistics.median(every) for row, every in found.items()}


def color(name):
    return OURS if name.startswith("ours") else PEERS


def draw_rates(axes):
    found = sorted(values("pinned", "of_wrk").items(), key=lambda item: item[1])
    names = [name for (name,), _ in found]
    axes.barh(names, [value for _, value in found], color=[color(name) for name in names])
    axes.set_title("Widgets a second, one process on one core, as a share of wrk's", fontsize=10)


def draw_backlog(axes):
    for number, percentile in enumerate(("p50_ms", "p99_ms")):
        found = values("backlog", "waiting", percentile)
        for name in dict.fromkeys(row[0] for row in found):
            points = sorted((waiting, value) for (contestant, waiting), value in found.items() if contestant == name)
            style = {"color": color(name), "linestyle": ("-", "--")[number], "marker": "o", "markersize": 3}
            axes.plot(*zip(*points, strict=True), **style)
            axes.annotate(f"{name} {percentile[:3]}", points[-1], fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("messages waiting")
    axes.set_title("Milliseconds of a claim", fontsize=10)


mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "performance", "font.size": 8}
figure, (rates, backlog) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
draw_rates(rates)
draw_backlog(backlog)
figure.savefig(OUT, metadata={"Date": None})
