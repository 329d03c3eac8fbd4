"""Speed and memory of frame-level AUROC from pieces, against scikit-learn on all frames, one thread.

python benchmarks/umil_frames.py [--json FILE] [--fast]

A set of the size of UCF-Crime's test videos: 290 of them, 1,111,808 frames, a score for every 30. Both follow the same
protocol and must give the same number. The exit status is 1 if a stated bound is missed.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _measure import Report, Turns, extra_bytes, in_fresh_process
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lightning_methods.functional import VideoRecord
from lightning_methods.metrics import FrameLevelAUROC

VIDEOS, FRAMES = 290, 1_111_808

Problem = tuple[list[VideoRecord], Tensor, Tensor, Tensor]


def problem(videos: int = VIDEOS, frames: int = FRAMES, seed: int = 0) -> Problem:
    """Records, and video, snippet and score of each cell; every other video has an anomaly in a tenth of its frames."""
    generator = np.random.default_rng(seed)
    share = generator.lognormal(sigma=1, size=videos)
    ends = np.round(np.cumsum(share / share.sum()) * (frames - 100 * videos)).astype(int)
    lengths = np.diff(ends, prepend=0) + 100
    records = []
    for number, length in enumerate(lengths.tolist()):
        start = int(generator.integers(1, length * 9 // 10))
        intervals = ((start, start + length // 10),) if number % 2 else ()
        records.append(VideoRecord(f"{number}.mp4", length, number % 2, intervals))
    cells = torch.tensor(lengths // 30)
    video = torch.arange(videos).repeat_interleave(cells)
    snippet = torch.cat([torch.arange(count) for count in cells.tolist()])
    return records, video, snippet, torch.from_numpy(generator.random(len(video), dtype=np.float32))


def pieces(records: list[VideoRecord], video: Tensor, snippet: Tensor, scores: Tensor) -> float:
    metric = FrameLevelAUROC(records)
    metric.update(video, snippet, scores)
    return float(metric.compute())


def frames(records: list[VideoRecord], video: Tensor, snippet: Tensor, scores: Tensor) -> float:
    """Every frame written out, as evaluation code does it, with arrays."""
    labels, values = [], []
    for number, record in enumerate(records):
        mine = video == number
        own = scores[mine][snippet[mine].argsort()].double().numpy()
        length, ratio = record.num_frames, record.num_frames / len(own)
        edges = (np.arange(len(own) + 1) * ratio + 0.5).astype(int)
        expanded = own.repeat(np.diff(edges))
        width = length // 32
        smooth = expanded[: 32 * width].reshape(32, width).mean(1).repeat(width)
        rest = expanded[32 * width :]
        values.append(np.concatenate([smooth, np.full(len(rest), rest.mean() if len(rest) else 0)]))
        label = np.zeros(length)
        for start, end in record.intervals:
            label[start:end] = 1
        labels.append(label)
    return float(roc_auc_score(np.concatenate(labels), np.concatenate(values)))


WAYS: dict[str, Callable[..., float]] = {"pieces": pieces, "frames": frames}


def memory(way: str) -> float:
    """MiB above what was resident before: the median of five processes, for a few pages more or less are chance."""
    return statistics.median(in_fresh_process(__file__, "--memory", way) for _ in range(5)) / 2**20


def compare(report: Report, fast: bool) -> None:
    given = problem()
    report.add("difference of the two areas", abs(pieces(*given) - frames(*given)), at_most=1e-12)
    turns = Turns({name: lambda way=way: way(*given) for name, way in WAYS.items()}, rounds=3 if fast else 15)
    for name in WAYS:
        report.add(f"{VIDEOS} videos, {FRAMES:,} frames: {name}, ms", 1e3 * turns.seconds(name))
    report.add("times faster than all frames", turns.ratio("frames", "pieces"), at_least=3)
    mib = {name: memory(name) for name in WAYS}
    for name, size in mib.items():
        report.add(f"{VIDEOS} videos, {FRAMES:,} frames: {name}, extra MiB", size)
    report.add("times less memory than all frames", mib["frames"] / mib["pieces"], at_least=20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--fast", action="store_true", help="fewer rounds")
    parser.add_argument("--memory", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        given, small = problem(), problem(videos=10, frames=20_000)
        way = WAYS[options.memory]
        print(extra_bytes(lambda: way(*given), warm_up=lambda: way(*small)))
        return 0
    report = Report()
    compare(report, options.fast)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
