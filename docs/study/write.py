"""Write the tables and plots of study.md and log.md from the stored studies beside this file.

    python docs/study/write.py
    python docs/study/write.py --keep ranks=runs/study/ranks/study.json

Each `NAME.json.gz` here is the study.json that `afaspec compare docs/study/NAME.yaml` left;
`--keep` stores a new one first, without this machine's folders. families.yaml is called once for
each family and leaves `families-FAMILY.json.gz`, and one table. In both pages what stands
between `<!-- begin NAME PART -->` and `<!-- end -->` is replaced; a plot shown there as
`study/NAME_PLOT.png` is drawn. The text around them is written by hand. Arms that can no longer be
trained have their rows in the log alone, in the parts that end in `/deleted`.
"""

from __future__ import annotations

import gzip
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from afaspec.compare.plots import overall_plots, study_plots
from afaspec.compare.study import read_study
from afaspec.compare.tables import (
    COMPARED,
    POOLED,
    SERVED,
    comparison_rows,
    domain_rows,
    pooled_rows,
    said,
    served_rows,
    settings_line,
)
from afaspec.pairs.names import NAMES, resolve_model
from bench.report.plots.style import styled
from bench.stats.resample import Figure
from bench.stats.verdict import Comparison, correct
from drafts.errors import UserError
from drafts.files import atomic_file
from drafts.registry import FAMILIES as TITLES

HERE = Path(__file__).parent
PAGE, LOG = HERE.parent / "study.md", HERE.parent / "log.md"
MARK = re.compile(r"<!-- begin (\S+) (\S+) -->(\n?).*?<!-- end -->", re.DOTALL)
COLUMNS = ("arm", "acceptance length", "more than base", "gap closed", "learning rate", "trained")
FAMILIES, ALL = "families", "all"  # marks that are about more than one study
FAMILY = ("family", "base", "LoRA", "along the gradient", "difference", "p (Holm)", "verdict")
# The ablation's arms whose settings afaspec no longer has.
DELETED = {
    "scaled-relu", "scaled-silu", "layer-by-layer", "by-loss", "refit", "distilled", "new-moments",
    "lora-plus", "afa-plus", "lora-cycles", "afa-cycles", "lora-restarts", "afa-restarts",
    "lora-wide", "afa-wide", "lora-allocated", "afa-allocated", "lora-both", "gradient-cycles",
    "gradient-32-cycles",
}  # fmt: skip
Json = dict[str, Any]


def main(
    keep: Annotated[
        list[str] | None, typer.Option(help="NAME=study.json to store first; repeatable.")
    ] = None,
) -> None:
    """Write both pages and their plots again, each whole or not at all."""
    for given in keep or []:
        name, _, path = given.partition("=")
        store(name, Path(path).read_text(encoding="utf-8"))
    studies = stored()
    texts = {page: filled(page.read_text(encoding="utf-8"), studies) for page in (PAGE, LOG)}
    with styled():
        for name, study in studies.items():
            plots = [p for domain in study["domains"] for p in study_plots(study, domain)]
            for stem, _, draw in [*overall_plots(study), *plots]:
                if any(f"study/{name}_{stem}.png" in text for text in texts.values()):
                    with atomic_file(HERE / f"{name}_{stem}.png") as temporary:
                        draw().savefig(temporary, format="png", dpi=130, facecolor="white")
    for page, text in texts.items():
        with atomic_file(page) as temporary:
            temporary.write_text(text, encoding="utf-8")


def store(name: str, study: str) -> None:
    """Keep the text of a study.json, with models and folders named as one would give them."""
    for model in NAMES:
        with suppress(UserError):  # one that is not on this machine is not in the study either
            study = study.replace(str(resolve_model(model)), model)
    study = study.replace(f"{Path.cwd()}/", "")
    with atomic_file(HERE / f"{name}.json.gz") as temporary:
        temporary.write_bytes(gzip.compress(study.encode(), mtime=0))


def stored() -> dict[str, Json]:
    """The studies beside this file, by name."""
    return {
        path.name.removesuffix(".json.gz"): read_study(path)
        for path in sorted(HERE.glob("*.json.gz"))
    }


def filled(text: str, studies: dict[str, Json]) -> str:
    """`text` with the content of every mark `begin STUDY PART` made anew."""

    def fill(mark: re.Match[str]) -> str:
        name, part, line_end = mark.groups()  # within a line there is none
        if name == FAMILIES:
            written = families(studies)
        elif name == ALL:
            written = work(studies)
        else:
            written = content(studies[name], part)
        return f"<!-- begin {name} {part} -->{line_end}{written}{line_end}<!-- end -->"

    return MARK.sub(fill, text)


def content(study: Json, part: str) -> str:
    """`settings`, `pooled`, or the table of a DOMAIN, of DOMAIN/comparisons or of DOMAIN/vllm.

    Deleted arms are left out; with `/deleted` at the end they alone are in.
    """
    if part == "settings":
        return settings_line(study)
    if part == "pooled":
        return table(POOLED, pooled_rows(study))
    domain, *what = part.split("/")
    results = with_arms(study["domains"][domain], deleted="deleted" in what)
    if "comparisons" in what:
        return table(COMPARED, comparison_rows(results))
    if "vllm" in what:
        return table(SERVED, served_rows(results))
    rows = []
    for cells in domain_rows(results):
        arm, length, more, gap, _, rate, trained = (joined(cell) for cell in cells)
        rows.append([arm, length, more, gap, rate, trained])
    return table(COLUMNS, rows)


def with_arms(results: Json, *, deleted: bool) -> Json:
    """A domain's results of the deleted arms, or of all others."""

    def belongs(*arms: str) -> bool:
        return bool(DELETED & set(arms)) == deleted

    return results | {
        "arms": [arm for arm in results["arms"] if belongs(arm["arm"])],
        "comparisons": [c for c in results["comparisons"] if belongs(c["arm"], c["against"])],
    }


def work(studies: dict[str, Json]) -> str:
    """What all studies together took; a cell that several of them share counts once."""
    cells = {(c["kind"], c["key"]): c for study in studies.values() for c in study["cells"]}
    trainings = sum(kind == "run" for kind, _ in cells)
    hours = sum(cell["seconds"] for cell in cells.values()) / 3600
    return f"{trainings} trainings and {hours:.1f} hours"


def families(studies: dict[str, Json]) -> str:
    """LoRA at random and along the gradient in each family, corrected for all together."""
    by_family = {
        name.removeprefix(f"{FAMILIES}-"): study["domains"]["cpp"]
        for name, study in studies.items()
        if name.startswith(f"{FAMILIES}-")
    }
    corrected = correct([compared(*found["comparisons"]) for found in by_family.values()])
    rows = []
    for (family, found), between in zip(by_family.items(), corrected, strict=True):
        lengths = [of["acceptance_length"] for of in (found["base"], *found["arms"])]
        difference = said(between.difference.as_json(), "{:+.3f}")
        last = [difference, f"{between.p_holm:.3g}", between.verdict]
        rows.append([TITLES[family].title, *(said(of, "{:.3f}") for of in lengths), *last])
    return table(FAMILY, rows)


def compared(found: Json) -> Comparison:
    """A stored comparison as it was made."""
    return Comparison(
        found["arm"],
        found["against"],
        found["metric"],
        Figure(**found["difference"]),
        Figure(**found["relative"]),
        found["p_value"],
        found["p_holm"],
    )


def joined(cell: Any) -> str:
    return f"{cell.text} ({cell.detail})" if cell.detail else str(cell.text)


def table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    typer.run(main)
