"""`lightning-methods eval-eqben`: scores an image-text model on EqBen, Winoground or VALSE."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_methods._files import FolderError, claim_folder, write_json
from lightning_methods.commands._device import as_device
from lightning_methods.commands._pair_scorers import FOILS, QUADS, SINGLE, Layout, Scorer, load_scorer
from lightning_methods.commands._score_parts import Scores, collect_scores, save_scores
from lightning_methods.datamodules import EqBenDataModule, ValseDataModule, WinogroundDataModule
from lightning_methods.functional import foil_scores, pair_group_scores

_PROG = "lightning-methods eval-eqben"
_ABOUT = """\
Scores every image with every text of its sample, prints a table with a row for each subset, and writes result.json and
prediction.npy. The latter has the scores in the order of the annotation, float32: one for each entry of a list of pairs
(what EqBen's server takes), four for a quadruple (image 0 with text 0, 0 with 1, 1 with 0, 1 with 1), two for an item
of VALSE (caption, foil). Ties count as wrong.
"""
_MODEL = """\
a name or folder of transformers (a dual encoder such as CLIP or SigLIP; scores are cosines), or
package.module:function. The function gets N images (PIL, RGB) and N texts and returns N scores, of image i with text i,
or embeddings of the images and of the texts, (N, D) each
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The options; None takes the program's own.

    Returns:
        Exit status: 0; 1 if model or data cannot be used; 2 if the output folder cannot be; 130 if the user pressed
        Ctrl-C.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(given)
    try:
        _run(options)
    except FolderError as error:
        return _sorry(f"{error}.", 2)
    except (ValueError, OSError, ImportError) as error:
        # What a worker process raised comes with its traceback and its type in front.
        sentence = str(error).rstrip().rpartition("\n")[2]
        return _sorry(sentence.removeprefix(f"{type(error).__name__}: "), 1)
    except KeyboardInterrupt:
        again = given if options.resume else [*given, "--resume"]
        return _sorry(f"Stopped. What was scored is kept; to go on: {_PROG} {shlex.join(again)}", 130)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=_PROG, description=_ABOUT)
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help=_MODEL)
    add("--root", required=True, type=Path, metavar="DIR", help="folder of the images")
    add("--annotation", required=True, nargs="+", type=Path, metavar="FILE", help="one file or, of EqBen, several")
    add("--benchmark", choices=("eqben", "winoground", "valse"), default="eqben", help="(default: eqben)")
    add("--subsets", nargs="+", metavar="NAME", help="of EqBen (default: all seven)")
    add("--labels", type=Path, metavar="DIR", help="of EqBen: folder of private_info.json and private_random_idx.json")
    add("--probabilities", action="store_true", help="of VALSE: the scores are probabilities; more is made of them")
    add("--out", type=Path, default=Path("runs/eval-eqben"), metavar="DIR", help="(default: %(default)s)")
    add("--resume", action="store_true", help="go on with what a stopped call left in --out")
    add("--batch-size", type=int, default=64, metavar="N", help="samples at a time (default: 64)")
    workers = min(4, os.cpu_count() or 1)
    add("--num-workers", type=int, default=workers, metavar="N", help="that read images (default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=as_device, default=device, help=f"of a model of transformers (default: {device})")
    return parser


@dataclass(frozen=True)
class _Task:
    """What is scored, and how its scores are summed up."""

    data: EqBenDataModule | WinogroundDataModule | ValseDataModule
    layout: Layout
    places: Tensor  # of each sample's scores in the prediction, (samples, scores)
    labelled: bool


def _run(options: Namespace) -> None:
    scorer = load_scorer(options.model, options.device)
    task = _task(options, scorer)
    claim_folder(options.out, _settings(options, len(task.data.dataset)), resume=options.resume)
    columns = len(task.layout.pairs)
    scores = collect_scores(
        task.data.test_dataloader(), lambda batch: scorer(batch, task.layout), columns, options.out / "parts"
    )
    if undefined := int(np.isnan(scores).sum()):
        print(f"{undefined} of {scores.size} scores are NaN and count as wrong.", file=sys.stderr)
    _write_prediction(options, scores, task.places)
    table = _table(options, task, torch.from_numpy(scores).double()) if task.labelled else {}
    write_json(options.out / "result.json", {"model": options.model, "benchmark": options.benchmark, "scores": table})
    if task.labelled:
        _print(table)
    else:
        print("The annotation has no labels, so there is a prediction and no score; --labels names their folder.")
    print(f"Everything is in {options.out}: result.json and prediction.npy.")


def _task(options: Namespace, scorer: Scorer) -> _Task:
    common = {
        "root": options.root,
        "transform": scorer.transform,
        "tokenizer": scorer.tokenizer,
        "batch_size": options.batch_size,
        "num_workers": options.num_workers,
    }
    if options.benchmark == "eqben":
        return _eqben(options, common)
    if options.subsets or options.labels or len(options.annotation) > 1:
        raise ValueError(f"--subsets, --labels and several files are for EqBen, not for {options.benchmark}")
    (annotation,) = options.annotation
    is_valse = options.benchmark == "valse"
    data = (ValseDataModule if is_valse else WinogroundDataModule)(annotation=annotation, **common)
    data.setup("test")
    layout = FOILS if is_valse else QUADS
    count = len(data.dataset)
    return _Task(data, layout, torch.arange(count * len(layout.pairs)).view(count, -1), labelled=True)


def _eqben(options: Namespace, common: Mapping[str, Any]) -> _Task:
    """Quadruples wherever it is known which pairs make one: they take half of the encoding."""
    given = {"annotation": options.annotation, "subsets": options.subsets, "labels": options.labels}
    labelled = EqBenDataModule(**common, **given).entries[0][0].sample >= 0
    data = EqBenDataModule(**common, **given, format="quads" if labelled else "flat")
    data.setup("test")
    return _Task(data, QUADS if labelled else SINGLE, data.entries[1], labelled)


def _settings(options: Namespace, samples: int) -> dict[str, Any]:
    """All that decides a score, to the last bit."""
    found = {}
    for package in ("torch", "transformers", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {
        "benchmark": options.benchmark,
        "model": options.model,
        "root": str(options.root.resolve()),
        "annotation": {str(path.resolve()): sha256(path.read_bytes()).hexdigest() for path in options.annotation},
        "labels": str(options.labels),
        "subsets": options.subsets or "all",
        "samples": samples,
        "batch_size": options.batch_size,
        "device": str(options.device),
        "versions": found,
    }


def _write_prediction(options: Namespace, scores: Scores, places: Tensor) -> None:
    prediction = np.empty(scores.size, dtype=np.float32)
    prediction[places.flatten().numpy()] = scores.flatten()
    save_scores(options.out / "prediction.npy", prediction)


def _table(options: Namespace, task: _Task, scores: Tensor) -> dict[str, dict[str, float]]:
    """Rows of shares in [0, 1] by subset, and a last one over all subsets."""
    subset = torch.tensor(task.data.dataset.samples.numbers["subset"])
    rows = {}
    for number, name in enumerate(task.data.subset_names):
        own = scores[subset == number]
        if len(own):
            rows[name] = {"samples": len(own), **_shares(options, own)}
    if options.benchmark != "eqben":
        return {**rows, "all": {"samples": len(scores), **_shares(options, scores)}}
    # Over all quadruples together one subset of the seven would count for four fifths.
    columns = {key: [row[key] for row in rows.values()] for key in ("text", "image", "group")}
    mean = {key: sum(values) / len(values) for key, values in columns.items()}
    return {**rows, "mean over subsets": {"samples": len(scores), **mean}}


def _shares(options: Namespace, scores: Tensor) -> dict[str, float]:
    columns = scores.unbind(1)
    if options.benchmark != "valse":
        return {key: float(share) for key, share in pair_group_scores(*columns)._asdict().items()}
    if not options.probabilities:
        return {"pairwise": float((columns[0] > columns[1]).double().mean())}
    return {key: float(share) for key, share in foil_scores(*columns)._asdict().items()}


def _print(table: Mapping[str, Mapping[str, float]]) -> None:
    names = [key for key in next(iter(table.values())) if key != "samples"]
    width = max(map(len, table))
    print(f"{'%':{width}}  {'samples':>8}  {'  '.join(f'{name:>8}' for name in names)}")
    for title, row in table.items():
        shares = "  ".join(f"{100 * row[name]:{max(8, len(name))}.2f}" for name in names)
        print(f"{title:{width}}  {row['samples']:8,}  {shares}")


def _sorry(sentence: str, status: int) -> int:
    print(f"error: {sentence}" if status < 130 else sentence, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
