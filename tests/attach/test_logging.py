"""What is logged and warned of, and when."""

import contextlib
import csv

import pytest
from plain import (
    ONE,
    Penalty,
    Plain,
    fit,
    pairs,
    penalty,
)
from pytorch_lightning.loggers import CSVLogger

from lightning_methods.attach import Method, Ramp

# --- logging ---------------------------------------------------------------------------------------


class TwoTerms(Method):
    def __init__(self, name="two", **arguments):
        super().__init__(name=name, weights={"b": 0.5}, **arguments)

    def losses(self, step):
        term = penalty(step.module)
        return {"a": term, "b": term * 2}


def rows(folder, module, *methods, **arguments):
    """What the CSV logger wrote, without empty cells."""
    logger = CSVLogger(folder, name="", version="")
    fit(module, *methods, logger=logger, **arguments)
    path = folder / "metrics.csv"
    with path.open() if path.exists() else contextlib.nullcontext([]) as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def named(row, prefix="two"):
    return {key: value for key, value in row.items() if key.startswith(f"{prefix}/")}


def test_raw_terms_their_weighted_sum_and_the_ramp_are_logged(tmp_path):
    module = Plain()
    value = penalty(module).item()
    found = rows(tmp_path, module, TwoTerms(ramp=Ramp(4)), batches=ONE)
    assert len(found) == 1
    expected = {"two/a": value, "two/b": 2 * value, "two/loss": 0.25 * (value + 0.5 * 2 * value), "two/ramp": 0.25}
    assert named(found[0]) == pytest.approx(expected)


def test_a_silent_ramp_logs_a_loss_of_0(tmp_path):
    found = rows(tmp_path, Plain(), TwoTerms(ramp=Ramp(1, start=1)), batches=ONE)
    assert named(found[0])["two/loss"] == 0
    assert named(found[0])["two/a"] > 0


class CountsLogs(Plain):
    def __init__(self):
        super().__init__()
        self.logs = []

    def log_dict(self, values, *args, **kwargs):
        self.logs.append((self.trainer.global_step, list(values)))
        super().log_dict(values, *args, **kwargs)


def test_nothing_is_logged_on_steps_that_the_trainer_does_not_log(tmp_path):
    module = CountsLogs()
    found = rows(tmp_path, module, TwoTerms(), batches=pairs(6), log_every_n_steps=3)
    assert [step for step, _ in module.logs] == [2, 5]
    assert [row["step"] for row in found if named(row)] == [2, 5]
    assert all(set(named(row)) == {"two/a", "two/b", "two/loss"} for row in found if named(row))


def test_log_false_logs_nothing(tmp_path):
    module = CountsLogs()
    found = rows(tmp_path, module, TwoTerms(log=False))
    assert not module.logs
    assert not any(map(named, found))


def test_log_epoch_adds_the_mean_over_steps(tmp_path):
    class Three(Method):
        def losses(self, step):
            return {"x": 0 * penalty(step.module) + step.index}

    # The last batch has other than the others' size: every step counts the same.
    batches = [*pairs(2), tuple(part[:1] for part in pairs(1)[0])]
    found = rows(tmp_path, Plain(), Three(name="two", log="epoch"), batches=batches, log_every_n_steps=2)
    steps = [row["two/x_step"] for row in found if "two/x_step" in row]
    epochs = [(row["two/x_epoch"], row["two/loss_epoch"]) for row in found if "two/x_epoch" in row]
    assert steps == [1.0]
    assert epochs == [(1.0, 1.0)]


def test_one_methods_epoch_values_are_not_the_others_business(tmp_path):
    alone = rows(tmp_path / "a", Plain(), TwoTerms())
    beside = rows(tmp_path / "b", Plain(), TwoTerms(), Penalty(0.0001, log="epoch"))
    assert [sorted(named(row)) for row in alone] == [sorted(named(row)) for row in beside if named(row)]
    assert {"penalty/l2_step", "penalty/l2_epoch"} <= set().union(*beside)


def test_nothing_is_logged_for_a_barebones_trainer():
    module = CountsLogs()
    arguments = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"))
    fit(module, TwoTerms(log="epoch"), barebones=True, log_every_n_steps=None, num_sanity_val_steps=None, **arguments)
    assert not module.logs


# --- warnings --------------------------------------------------------------------------------------


class Idle(Method):
    """Does something in its second epoch only."""

    def __init__(self, kind):
        super().__init__(name="idle")
        self.kind = kind

    @property
    def rewrites(self):
        return self.kind == "rewrite"

    def rewrite(self, step):
        if step.epoch == 1:
            step["batch.0"] = step["batch.0"] * 1

    @property
    def adds_losses(self):
        return self.kind == "losses"

    def losses(self, step):
        return {"x": penalty(step.module)} if step.epoch == 1 else {}


@pytest.mark.parametrize("kind", ["rewrite", "losses"])
def test_a_method_that_did_nothing_in_an_epoch_says_so(kind, recwarn):
    fit(Plain(), Idle(kind), Penalty(), max_epochs=3)
    about = [str(warning.message) for warning in recwarn if "did nothing" in str(warning.message)]
    assert [text.partition("in ")[2] for text in about] == [
        "epoch 0: it neither changed a batch nor gave a term.",
        "epoch 2: it neither changed a batch nor gave a term.",
    ]
    assert all(text.startswith("Idle(") for text in about)


class Notes(Method):
    """Notes the step's index before and after the module's own step, and counts for how many steps it is asked."""

    def __init__(self, name="notes", **arguments):
        super().__init__(name=name, **arguments)
        self.logs = []

    def rewrite(self, step):
        step.note({"before": 10 + step.index})

    def losses(self, step):
        self.logs.append(step.logs)
        step.note({"after": step.output * 0 + step.index})
        return {"a": penalty(step.module)}


def test_notes_are_logged_beside_the_terms_in_one_call(tmp_path):
    module, noting = CountsLogs(), Notes()
    found = rows(tmp_path, module, noting, TwoTerms(), batches=pairs(6), log_every_n_steps=3)
    assert [len(values) for _, values in module.logs] == [4 + 3] * 2
    notes = [named(row, "notes") for row in found if named(row, "notes")]
    assert [(row["notes/before"], row["notes/after"]) for row in notes] == [(12, 2), (15, 5)]
    assert noting.logs == [False, False, True] * 2


def test_notes_of_a_method_that_only_rewrites(tmp_path):
    class Rewrites(Method):
        def rewrite(self, step):
            step.note({"index": step.index})

    found = rows(tmp_path, Plain(), Rewrites(name="rewrites", log="epoch"), batches=pairs(2), log_every_n_steps=10)
    assert [row["rewrites/index_epoch"] for row in found if "rewrites/index_epoch" in row] == [0.5]


def test_log_false_notes_nothing(tmp_path):
    assert not any(named(row, "notes") for row in rows(tmp_path, Plain(), Notes(log=False)))
