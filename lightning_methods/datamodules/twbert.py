"""What TW-BERT trains on: videos with captions, and videos with questions, in the layouts of its official code.

Source: "Learning Trajectory-Word Alignments for Video-Language Tasks" (ICCV 2023, arXiv 2301.01953) and its code,
which follow ALPRO. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch.utils.data import DataLoader

from lightning_methods.datamodules._annotations import Entry, read_json, read_json_lines
from lightning_methods.datamodules._base import LightningDataModule
from lightning_methods.datamodules._clips import (
    ClipFiles,
    ClipLoader,
    ClipSamples,
    FrameChoice,
    OnError,
    check_clip_options,
    find_videos,
    load_clip,
)
from lightning_methods.datamodules._text_image import Batch, Collate, Tokenizer, as_tokenizer, check_tokenizer

RetrievalSet: TypeAlias = Literal["msrvtt_ret", "didemo_ret", "lsmdc_ret", "activity_ret"]
QuestionSet: TypeAlias = Literal["msrvtt_qa", "msvd_qa"]

_LAYOUT = "Expected layout: <root>/{name}/txt/{{train,val,test}}.jsonl and <root>/{name}/videos/<clip>.mp4."


class _VideoTextFiles(LightningDataModule):
    """What both share: where the files are, how clips are read, and loaders."""

    def __init__(
        self,
        root: str | Path,
        dataset: str,
        num_frames: int,
        train_frames: FrameChoice,
        image_size: int,
        tokenizer: Tokenizer | str | None,
        loader: ClipLoader,
        on_error: OnError,
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        check_clip_options(num_frames, image_size, batch_size, num_workers, on_error)
        check_tokenizer(tokenizer)
        if train_frames not in get_args(FrameChoice):
            raise ValueError(f"train_frames must be one of {', '.join(get_args(FrameChoice))}, got {train_frames!r}")
        self.folder = Path(root).expanduser() / dataset
        self.layout = _LAYOUT.format(name=dataset)
        self.num_frames, self.train_frames, self.image_size = num_frames, train_frames, image_size
        self.tokenizer, self.loader, self.on_error = tokenizer, loader, on_error
        self.batch_size, self.num_workers = batch_size, num_workers
        self.datasets: dict[str, ClipFiles] = {}

    def _annotation(self, split: str) -> list[Entry]:
        path = self.folder / "txt" / f"{split}.jsonl"
        found = list(read_json_lines(path, self.layout))
        if not found:
            raise ValueError(f"{path} has no lines. {self.layout}")
        return found

    def _videos(self, names: Sequence[str]) -> list[Path]:
        found = find_videos(self.folder / "videos", names, self.layout)
        return [found[name] for name in names]

    def _clips(self, samples: ClipSamples, *, training: bool) -> ClipFiles:
        how: FrameChoice = self.train_frames if training else "uniform"
        on_error: OnError = self.on_error if training else "raise"  # a figure must not rest on another video
        return ClipFiles(samples, self.num_frames, how, self.image_size, self.loader, on_error)

    def _loader(self, dataset: Any, *, shuffle: bool = False) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=shuffle,
            collate_fn=Collate(as_tokenizer(self.tokenizer)),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class VideoTextDataModule(_VideoTextFiles):
    """MSRVTT, DiDeMo, LSMDC or ActivityNet, to train and evaluate video-text retrieval.

    In training every clip is a sample, with one of its captions drawn at random: {"video", "text", "video_id"}. Two
    samples of a batch are never of one clip. Validation and testing have two loaders, {"video", "video_id"} with every
    clip once and {"text", "video_id", "text_id"} with every caption once, in the order of the file. "video" is
    (B, T, 3, side, side), normalised as for CLIP; "video_id" numbers the clips of the split in the order of the file.

    DiDeMo's usual protocol joins all sentences of a video into one caption: write it so into the annotation. (Whether
    the authors' files do is not known.)

    Args:
        root: Folder that holds `<dataset>/txt/{train,val,test}.jsonl`, with {"caption", "clip_name"} in each line, and
            `<dataset>/videos`, with `<clip_name>` as a video file of any format, a ZIP or a folder of images.
        dataset: Which of them.
        num_frames: T; the authors take 8, of DiDeMo 20.
        train_frames: "random": different frames; "headtail": half of them from each half, as the authors do in
            pretraining; "uniform": as in evaluation, evenly spaced from the first frame on.
        image_size: Side of the square into which frames are squeezed.
        tokenizer: A function of a list of texts, "transformers:NAME", or None for lists of text.
        loader: Reads a clip, (path, T, how, side) -> uint8 (T, 3, side, side); another one may decode otherwise.
        on_error: In training, "replace" takes another clip for one that cannot be read, as the authors do.
        batch_size: Samples per batch and process; an incomplete last training batch is left out.
        num_workers: Processes that decode, per loader.

    Raises:
        ValueError: An argument is none of what it can be. In `setup`: a line is damaged or lacks something; the message
            names file and line. From a loader: a video cannot be read.
        FileNotFoundError: In `setup`: a file is missing, or videos are; they are counted and the first is named.
        ModuleNotFoundError: A video file needs PyAV, or the tokenizer transformers, which is not installed.
    """

    def __init__(
        self,
        root: str | Path,
        dataset: RetrievalSet = "msrvtt_ret",
        num_frames: int = 8,
        train_frames: FrameChoice = "random",
        image_size: int = 224,
        tokenizer: Tokenizer | str | None = None,
        loader: ClipLoader = load_clip,
        on_error: OnError = "raise",
        batch_size: int = 8,
        num_workers: int = 8,
    ) -> None:
        if dataset not in get_args(RetrievalSet):
            raise ValueError(f"dataset must be one of {', '.join(get_args(RetrievalSet))}, got {dataset!r}")
        super().__init__(
            root, dataset, num_frames, train_frames, image_size, tokenizer, loader, on_error, batch_size, num_workers
        )
        self.texts: dict[str, list[dict[str, Any]]] = {}

    def setup(self, stage: str) -> None:
        """Reads the annotations that the stage needs, and looks for the videos."""
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",)):
            captions: dict[str, list[str]] = {}
            lines = [(line.text("clip_name"), _words(line, "caption")) for line in self._annotation(split)]
            for clip, caption in lines:
                captions.setdefault(clip, []).append(caption)
            number = {clip: place for place, clip in enumerate(captions)}
            texts = {"text": list(captions.values())} if split == "train" else {}
            samples = ClipSamples(self._videos(list(captions)), texts, {"video_id": list(number.values())})
            self.datasets[split] = self._clips(samples, training=split == "train")
            self.texts[split] = [
                {"text": caption, "video_id": number[clip], "text_id": place}
                for place, (clip, caption) in enumerate(lines)
            ]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches of clips, each with one of its captions."""
        return self._loader(self.datasets["train"], shuffle=True)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """Batches of the validation clips, and batches of their captions, both in order."""
        return self._evaluation("val")

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """Batches of the test clips, and batches of their captions, both in order."""
        return self._evaluation("test")

    def predict_dataloader(self) -> list[DataLoader[Batch]]:
        """As `test_dataloader`."""
        return self.test_dataloader()

    def _evaluation(self, split: str) -> list[DataLoader[Batch]]:
        return [self._loader(self.datasets[split]), self._loader(self.texts[split])]


class VideoQADataModule(_VideoTextFiles):
    """MSRVTT-QA or MSVD-QA: questions about videos, with one of a list of answers.

    A batch is {"video", "question", "target", "answer_type"}: "target" is the answer's number, -1 for an answer that is
    not in the list (it counts as wrong whatever is predicted; in training such lines are left out), "answer_type" a
    place in `answer_types`. `metrics.AnswerAccuracy` counts so.

    Args:
        root: Folder that holds `<dataset>/txt/{train,val,test}.jsonl`, with {"question", "answer", "video_id",
            "answer_type"} in each line, `<dataset>/txt/train_ans2label.json`, {answer: number}, and `<dataset>/videos`.
        dataset: Which of them.
        num_frames: T; the authors take 32 before their frame selection.
        train_frames: As in `VideoTextDataModule`.
        image_size: As in `VideoTextDataModule`.
        tokenizer: As in `VideoTextDataModule`.
        loader: As in `VideoTextDataModule`.
        on_error: As in `VideoTextDataModule`.
        batch_size: Samples per batch and process; an incomplete last training batch is left out.
        num_workers: Processes that decode, per loader.

    Raises:
        ValueError: As in `VideoTextDataModule`.
        FileNotFoundError: As in `VideoTextDataModule`.
        ModuleNotFoundError: As in `VideoTextDataModule`.
    """

    answer_types = ("what", "who", "how", "where", "when")

    def __init__(
        self,
        root: str | Path,
        dataset: QuestionSet = "msrvtt_qa",
        num_frames: int = 32,
        train_frames: FrameChoice = "random",
        image_size: int = 224,
        tokenizer: Tokenizer | str | None = None,
        loader: ClipLoader = load_clip,
        on_error: OnError = "raise",
        batch_size: int = 8,
        num_workers: int = 8,
    ) -> None:
        if dataset not in get_args(QuestionSet):
            raise ValueError(f"dataset must be one of {', '.join(get_args(QuestionSet))}, got {dataset!r}")
        super().__init__(
            root, dataset, num_frames, train_frames, image_size, tokenizer, loader, on_error, batch_size, num_workers
        )

    @cached_property
    def answers(self) -> dict[str, int]:
        """The number of each answer."""
        path = self.folder / "txt" / "train_ans2label.json"
        content = read_json(path, self.layout)
        if not isinstance(content, dict) or sorted(map(repr, content.values())) != sorted(
            map(repr, range(len(content)))
        ):
            raise ValueError(f"{path} must map answers to the numbers 0 … n - 1, each once.")
        return content

    @property
    def num_classes(self) -> int:
        """How many answers there are."""
        return len(self.answers)

    def setup(self, stage: str) -> None:
        """Reads the annotations that the stage needs, and looks for the videos."""
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",)):
            lines = self._annotation(split)
            if split == "train":
                lines = [line for line in lines if line.text("answer") in self.answers]
            numbers: Mapping[str, list[int]] = {
                "target": [self.answers.get(line.text("answer"), -1) for line in lines],
                "answer_type": [self._type_of(line) for line in lines],
            }
            questions = {"question": [[_words(line, "question")] for line in lines]}
            samples = ClipSamples(self._videos([line.text("video_id") for line in lines]), questions, numbers)
            self.datasets[split] = self._clips(samples, training=split == "train")

    def _type_of(self, line: Entry) -> int:
        kind = line.text("answer_type")
        if kind not in self.answer_types:
            raise line.error(f"'answer_type' must be one of {', '.join(self.answer_types)}, found {kind!r}")
        return self.answer_types.index(kind)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches."""
        return self._loader(self.datasets["train"], shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches in order."""
        return self._loader(self.datasets["val"])

    def test_dataloader(self) -> DataLoader[Batch]:
        """Batches in order."""
        return self._loader(self.datasets["test"])

    def predict_dataloader(self) -> DataLoader[Batch]:
        """As `test_dataloader`."""
        return self.test_dataloader()


def _words(line: Entry, key: str) -> str:
    text = line.text(key)
    if not text.strip():
        raise line.error(f"{key!r} is empty")
    return text
