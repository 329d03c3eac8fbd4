import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lightning_methods.datamodules import VideoQADataModule, VideoTextDataModule
from lightning_methods.datamodules._clips import choose_frames, load_clip
from lightning_methods.datamodules._video_files import VideoError, write_video


def grey(value, frames=5, size=(12, 8)):
    """A video whose frame t is grey of `value` + t."""
    return torch.stack([torch.full((3, *size), value + index, dtype=torch.uint8) for index in range(frames)])


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def retrieval(tmp_path):
    """Video files, and one clip as a folder of images; train clips b and a have two captions and one."""
    folder = tmp_path / "msrvtt_ret"
    for number, name in enumerate(("a", "b", "c")):
        write_video(folder / "videos" / f"{name}.mp4", grey(50 * number))
    (folder / "videos" / "d").mkdir()
    for index, frame in enumerate(grey(150)):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(folder / "videos" / "d" / f"frame_{index}.png")
    rows = [("b", "second"), ("a", "first"), ("b", "second again")]
    lines(folder / "txt" / "train.jsonl", [{"caption": text, "clip_name": clip} for clip, text in rows])
    rows = [("d", "fourth"), ("c", "third"), ("d", "fourth again")]
    for split in ("val", "test"):
        lines(folder / "txt" / f"{split}.jsonl", [{"caption": text, "clip_name": clip} for clip, text in rows])
    return tmp_path


def data(root, stage="fit", cls=VideoTextDataModule, **options):
    module = cls(root, **{"num_frames": 2, "image_size": 4, "batch_size": 2, "num_workers": 0, **options})
    module.setup(stage)
    return module


def value_of(video):
    """Grey values of frames (..., 3, H, W), from CLIP's normalisation back to 0 … 255."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    channels = video.mean((-1, -2)) * std + mean
    assert channels.std(-1).max() < 1e-5
    return (255 * channels.mean(-1)).round().int()


class TestRetrieval:
    def test_training_has_each_clip_once_with_one_of_its_captions(self, retrieval):
        torch.manual_seed(0)
        module, seen = data(retrieval), set()
        for _ in range(12):
            (batch,) = module.train_dataloader()
            assert batch["video"].shape == (2, 2, 3, 4, 4)
            assert sorted(batch["video_id"].tolist()) == [0, 1]
            seen |= set(zip(batch["video_id"].tolist(), batch["text"], strict=True))
            first = value_of(batch["video"])[batch["video_id"] == 0]
            assert ((first >= 50) & (first < 55)).all()
            assert (first[0, 0] < first[0, 1]).all()
        assert seen == {(0, "second"), (0, "second again"), (1, "first")}

    @pytest.mark.parametrize("stage", ["validate", "test", "predict"])
    def test_evaluation_has_clips_once_and_captions_once(self, retrieval, stage):
        module = data(retrieval, stage)
        loaders = module.val_dataloader() if stage == "validate" else module.test_dataloader()
        (videos,), texts = (list(loader) for loader in loaders)
        assert videos["video_id"].tolist() == [0, 1]
        assert value_of(videos["video"]).tolist() == [[150, 152], [100, 102]]  # d first; frames 0 and 2 of 5
        found = [row for batch in texts for row in zip(batch["text"], batch["video_id"].tolist(), strict=True)]
        assert found == [("fourth", 0), ("third", 1), ("fourth again", 0)]
        assert torch.cat([batch["text_id"] for batch in texts]).tolist() == [0, 1, 2]

    def test_evaluation_draws_nothing(self, retrieval):
        module = data(retrieval, "test")
        before = torch.get_rng_state()
        module.datasets["test"][0]
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_tokenizer_and_a_loader_of_ones_own(self, retrieval):
        def loader(path, count, how, side):
            return torch.full((count, 3, side, side), len(how), dtype=torch.uint8)

        module = data(retrieval, tokenizer=lambda texts: torch.tensor([[len(text)] for text in texts]), loader=loader)
        (batch,) = module.train_dataloader()
        assert batch["text"].shape == (2, 1)
        assert (value_of(batch["video"]) == len("random")).all()

    def test_missing_videos_are_counted(self, retrieval):
        for name in ("a", "b"):
            (retrieval / "msrvtt_ret" / "videos" / f"{name}.mp4").unlink()
        with pytest.raises(FileNotFoundError, match=r"2 of 2 videos are not in .*videos; first: b\. Expected layout"):
            data(retrieval)

    def test_a_missing_annotation(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"train\.jsonl is missing\. Expected layout: <root>/didemo_ret/txt"
        ):
            data(tmp_path, dataset="didemo_ret")

    def test_a_damaged_line_is_named(self, retrieval):
        path = retrieval / "msrvtt_ret" / "txt" / "train.jsonl"
        path.write_text(path.read_text() + '{"caption": "no clip"}\n')
        with pytest.raises(ValueError, match=r"train\.jsonl, entry in line 4: there is no 'clip_name'"):
            data(retrieval)

    @pytest.mark.parametrize("caption", ["", " \n"])
    def test_an_empty_caption_is_named(self, retrieval, caption):
        path = retrieval / "msrvtt_ret" / "txt" / "train.jsonl"
        path.write_text(path.read_text() + json.dumps({"caption": caption, "clip_name": "a"}) + "\n")
        with pytest.raises(ValueError, match=r"train\.jsonl, entry in line 4: 'caption' is empty"):
            data(retrieval)

    def test_a_clip_in_an_array(self, retrieval):
        folder = retrieval / "msrvtt_ret" / "videos"
        (folder / "c.mp4").unlink()
        np.save(folder / "c.npy", grey(100).permute(0, 2, 3, 1).numpy())
        (videos,) = data(retrieval, "test").test_dataloader()[0]
        assert value_of(videos["video"]).tolist() == [[150, 152], [100, 102]]

    def test_an_empty_annotation(self, retrieval):
        (retrieval / "msrvtt_ret" / "txt" / "val.jsonl").write_text("\n")
        with pytest.raises(ValueError, match=r"val\.jsonl has no lines"):
            data(retrieval)

    def test_a_damaged_video_is_named_or_replaced_in_training(self, retrieval):
        (retrieval / "msrvtt_ret" / "videos" / "b.mp4").write_bytes(b"no video")
        with pytest.raises(VideoError, match=r"b\.mp4"):
            list(data(retrieval).train_dataloader())
        torch.manual_seed(0)
        (batch,) = data(retrieval, on_error="replace").train_dataloader()
        assert batch["video_id"].tolist() == [1, 1]
        assert batch["text"] == ["first", "first"]

    def test_a_damaged_video_is_never_replaced_in_evaluation(self, retrieval):
        (retrieval / "msrvtt_ret" / "videos" / "c.mp4").write_bytes(b"no video")
        with pytest.raises(VideoError, match=r"c\.mp4"):
            list(data(retrieval, "test", on_error="replace").test_dataloader()[0])

    def test_damage_everywhere_ends(self, retrieval):
        for name in ("a", "b"):
            (retrieval / "msrvtt_ret" / "videos" / f"{name}.mp4").write_bytes(b"no video")
        with pytest.raises(VideoError, match="10 videos in a row"):
            list(data(retrieval, on_error="replace").train_dataloader())

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("dataset", "msrvtt"),
            ("num_frames", 0),
            ("image_size", 0),
            ("batch_size", 0),
            ("num_workers", -1),
            ("on_error", "skip"),
            ("train_frames", "all"),
            ("tokenizer", "bert"),
        ],
    )
    def test_arguments_are_checked(self, tmp_path, name, value):
        with pytest.raises(ValueError, match=rf"{name} must be .*{re.escape(str(value))}"):
            VideoTextDataModule(tmp_path, **{name: value})


@pytest.fixture
def questions(tmp_path):
    folder = tmp_path / "msvd_qa"
    write_video(folder / "videos" / "v1.avi", grey(10), lossless=False)
    rows = [("who runs", "man", "who"), ("where", "nowhere", "where"), ("what runs", "dog", "what")]
    for split in ("train", "val", "test"):
        lines(
            folder / "txt" / f"{split}.jsonl",
            [
                {"question": question, "answer": answer, "video_id": "v1", "answer_type": kind}
                for question, answer, kind in rows
            ],
        )
    (folder / "txt" / "train_ans2label.json").write_text('{"dog": 0, "man": 1}')
    return tmp_path


class TestQuestions:
    def test_an_answer_outside_the_list_is_never_right_and_not_trained_on(self, questions):
        module = data(questions, cls=VideoQADataModule, dataset="msvd_qa")
        assert module.num_classes == 2
        (batch,) = module.train_dataloader()
        assert sorted(zip(batch["question"], batch["target"].tolist(), strict=True)) == [
            ("what runs", 0),
            ("who runs", 1),
        ]
        module.setup("test")
        found = [batch["target"].tolist() for batch in module.test_dataloader()]
        assert found == [[1, -1], [0]]
        types = [module.answer_types[kind] for batch in module.test_dataloader() for kind in batch["answer_type"]]
        assert types == ["who", "where", "what"]

    def test_an_unknown_type_is_named(self, questions):
        path = questions / "msvd_qa" / "txt" / "val.jsonl"
        path.write_text(path.read_text().replace('"where"}', '"why"}'))
        with pytest.raises(ValueError, match=r"val\.jsonl, entry in line 2: 'answer_type' must be one of .*'why'"):
            data(questions, cls=VideoQADataModule, dataset="msvd_qa")

    def test_an_empty_question_is_named(self, questions):
        path = questions / "msvd_qa" / "txt" / "train.jsonl"
        path.write_text(path.read_text().replace("what runs", ""))
        with pytest.raises(ValueError, match=r"train\.jsonl, entry in line 3: 'question' is empty"):
            data(questions, cls=VideoQADataModule, dataset="msvd_qa")

    @pytest.mark.parametrize("content", ['{"dog": 0, "man": 2}', '{"dog": 0, "man": 0}', '["dog"]', '{"dog": "0"}'])
    def test_answers_must_be_numbered(self, questions, content):
        (questions / "msvd_qa" / "txt" / "train_ans2label.json").write_text(content)
        with pytest.raises(ValueError, match=r"train_ans2label\.json must map answers to the numbers"):
            data(questions, cls=VideoQADataModule, dataset="msvd_qa")

    def test_the_data_set_is_checked(self, tmp_path):
        with pytest.raises(ValueError, match="dataset must be one of msrvtt_qa, msvd_qa, got 'msrvtt_ret'"):
            VideoQADataModule(tmp_path, "msrvtt_ret")


@given(num_frames=st.integers(1, 60), count=st.integers(1, 20), how=st.sampled_from(["random", "headtail", "uniform"]))
def test_chosen_frames(num_frames, count, how):
    chosen = choose_frames(num_frames, count, how)
    assert len(chosen) == count
    assert chosen == sorted(chosen)
    assert 0 <= chosen[0] <= chosen[-1] < num_frames
    if num_frames >= count:
        assert len(set(chosen)) == count
    if how == "headtail" and num_frames >= 2 * count:
        assert sum(index < num_frames // 2 for index in chosen) == count // 2
    if how == "uniform" and num_frames >= count:
        assert chosen == [place * (num_frames // count) for place in range(count)]


def test_random_frames_differ_from_call_to_call():
    torch.manual_seed(0)
    assert len({tuple(choose_frames(20, 4, "random")) for _ in range(20)}) > 15


def test_frames_are_squeezed_into_a_square(tmp_path):
    wide = torch.zeros(1, 3, 8, 24, dtype=torch.uint8)
    wide[..., 12:] = 200
    write_video(tmp_path / "wide.mp4", wide)
    frame = load_clip(tmp_path / "wide.mp4", 1, "uniform", 4)[0]
    assert frame.shape == (3, 4, 4)
    assert (frame[:, :, 0] == 0).all()
    assert (frame[:, :, 3] == 200).all()
