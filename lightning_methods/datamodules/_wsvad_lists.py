"""Lists and annotations of UCF-Crime and TAD, as text files: columns between blanks, no header."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from lightning_methods.functional import VideoRecord

_LISTS = '"path 0 num_frames class" to train on, "path num_frames class start end [start end]" to test on'
_ANNOTATIONS = '"video class start end start end"'
_Intervals = tuple[tuple[int, int], ...]
_Parsed = TypeVar("_Parsed")


def read_wsvad_list(path: str | Path) -> list[VideoRecord]:
    """Videos of a list in the form that the code of weakly supervised anomaly detection shares.

    Lines of four fields are training videos, `path 0 num_frames class`, which have no intervals; those of more are test
    videos, `path num_frames class start end` with any number of intervals. Intervals that are not used read -1 -1. A
    normal video, class 0, has none, whatever stands there. Ends beyond the video are cut.

    Args:
        path: The text file.

    Returns:
        One record a line, in order.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is empty or lines have another form; the message counts them and shows the first.
    """
    return _read(Path(path), _LISTS, _parse_record)


def read_temporal_annotations(path: str | Path) -> dict[str, tuple[tuple[int, int], ...]]:
    """UCF-Crime's own file of temporal annotations, lines `video class start end start end`.

    Args:
        path: The text file, such as `Temporal_Anomaly_Annotation_for_Testing_Videos.txt`.

    Returns:
        The intervals (start, end) by name of the video, such as "Abuse028_x264.mp4"; those that read -1 -1 are left
        out. The end is taken as not included, as in the lists.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is empty, names a video twice, or lines have another form; the message counts them and shows the
            first.
    """
    path = Path(path)
    lines = _read(path, _ANNOTATIONS, _parse_annotation)
    name, times = Counter(name for name, _ in lines).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{path}: {name} is annotated {times} times")
    return dict(lines)


class Annotation(NamedTuple):
    """The anomalies of a video, and how many frames it has; None if the file does not say."""

    intervals: _Intervals = ()
    num_frames: int | None = None


def read_any_annotations(path: Path) -> dict[str, Annotation]:
    """By name of the video, from a list or a file of temporal annotations: whichever it is.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is neither.
    """
    try:
        return {record.name: Annotation(record.intervals, record.num_frames) for record in read_wsvad_list(path)}
    except ValueError as of_list:
        try:
            return {name: Annotation(intervals) for name, intervals in read_temporal_annotations(path).items()}
        except ValueError as of_annotations:
            raise ValueError(f"{of_list}; nor are they {of_annotations}") from of_annotations


def annotate(
    records: Sequence[VideoRecord], annotations: Mapping[str, _Intervals], list_path: Path, path: Path
) -> list[VideoRecord]:
    """The records with the intervals of the annotations in place of their own.

    Raises:
        ValueError: A video is annotated that is not in the list, a normal one has an anomaly, or an abnormal one has
            none.
    """
    strangers = annotations.keys() - {record.name for record in records}
    if strangers:
        raise ValueError(f"{path} annotates {len(strangers)} videos that {list_path} lacks; first: {min(strangers)}")
    found = []
    for record in records:
        intervals = _cut(annotations.get(record.name, ()), record.num_frames)
        if bool(intervals) != bool(record.label):
            state = f"abnormal (class {record.label})" if record.label else "normal"
            raise ValueError(
                f"{record.name} is {state} in {list_path}, but has {len(intervals)} anomalies within its "
                f"{record.num_frames} frames in {path}"
            )
        found.append(record._replace(intervals=intervals))
    return found


def _read(path: Path, form: str, parse: Callable[[list[str]], _Parsed]) -> list[_Parsed]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected a text file with lines {form}")
    lines = [(number, line.split()) for number, line in enumerate(path.read_text().splitlines(), start=1)]
    lines = [(number, fields) for number, fields in lines if fields]
    if not lines:
        raise ValueError(f"{path} is empty; expected lines {form}")
    found, problems = [], []
    for number, fields in lines:
        try:
            found.append(parse(fields))
        except ValueError as error:
            problems.append(f'line {number}, "{" ".join(fields)}": {error}')
    if problems:
        raise ValueError(f"{path}: {len(problems)} of {len(lines)} lines are not {form}; first: {problems[0]}")
    return found


def _parse_record(fields: list[str]) -> VideoRecord:
    path, *rest = fields
    numbers = [int(field) for field in rest]
    if len(numbers) < 3:
        raise ValueError(f"{len(fields)} fields")
    if len(numbers) == 3:
        start, num_frames, label = numbers
        if start != 0:
            raise ValueError(f"it starts at frame {start}, not 0")
    else:
        num_frames, label = numbers[:2]
    if num_frames < 1 or label < 0:
        raise ValueError(f"{num_frames} frames of class {label}")
    intervals = _pairs(numbers[2:]) if len(numbers) > 3 else ()
    return VideoRecord(path, num_frames, label, _cut(intervals, num_frames) if label else ())


def _parse_annotation(fields: list[str]) -> tuple[str, _Intervals]:
    if len(fields) < 4:
        raise ValueError(f"{len(fields)} fields")
    return fields[0], _pairs([int(field) for field in fields[2:]])


def _pairs(numbers: Sequence[int]) -> _Intervals:
    if len(numbers) % 2:
        raise ValueError("a start without an end")
    pairs = [(start, end) for start, end in zip(numbers[::2], numbers[1::2], strict=True) if (start, end) != (-1, -1)]
    for start, end in pairs:
        if not 0 <= start <= end:
            raise ValueError(f"an interval from {start} to {end}")
    return tuple(pairs)


def _cut(intervals: Iterable[tuple[int, int]], num_frames: int) -> _Intervals:
    return tuple((start, min(end, num_frames)) for start, end in intervals if start < min(end, num_frames))
