import copy
import io
import pickle

import pytest
import torch
from no_sync import NoSync
from ranks import on_ranks
from torch import Tensor, nn

from lightning_methods.functional import ikl_loss, ikl_terms
from lightning_methods.modules import IKLLoss

CLASSES = 4


def batches(count: int = 4, size: int = 6, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Student logits, teacher logits and targets; class 3 never occurs."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, CLASSES, generator=generator),
            2 * torch.randn(size, CLASSES, generator=generator),
            torch.randint(CLASSES - 1, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def true_means(data: list[tuple[Tensor, Tensor, Tensor]], temperature: float = 1.0) -> Tensor:
    """Row by row, over all samples of a class; uniform for one without samples."""
    means = torch.full((CLASSES, CLASSES), 1 / CLASSES)
    for y in range(CLASSES):
        rows = [(row / temperature).softmax(0) for _, teacher, target in data for row in teacher[target == y]]
        if rows:
            means[y] = torch.stack(rows).mean(0)
    return means


def test_means_of_an_epoch_serve_in_the_next():
    data = batches()
    loss = IKLLoss(CLASSES, wmse_weight=3.0, ce_weight=0.5, temperature=2.0, weight_temperature=4.0)
    options = {"wmse_weight": 3.0, "ce_weight": 0.5, "temperature": 2.0}
    uniform = torch.full((CLASSES, CLASSES), 1 / CLASSES)
    for student, teacher, target in data:
        torch.testing.assert_close(
            loss(student, teacher, target), ikl_loss(student, teacher, uniform, target, **options)
        )
    loss.end_epoch()
    means = true_means(data, temperature=4.0)
    torch.testing.assert_close(loss.class_probs, means)
    assert torch.equal(loss.class_probs[3], uniform[3])
    assert loss.class_sums.count_nonzero() == 0
    student, teacher, target = data[0]
    torch.testing.assert_close(loss(student, teacher, target), ikl_loss(student, teacher, means, target, **options))


def test_generalised_loss():
    student, teacher, target = batches(1)[0]
    loss = IKLLoss(CLASSES, normalization="weight", gamma=0.3)
    loss.class_probs.copy_(true_means(batches()))
    expected = ikl_terms(student, teacher, loss.class_probs, target, normalization="weight", gamma=0.3).loss
    torch.testing.assert_close(loss(student, teacher, target), expected)


def test_momentum_mixes_with_the_previous_means():
    data = batches()
    loss = IKLLoss(CLASSES, class_momentum=0.3)
    for _, teacher, target in data:
        loss.update(teacher, target)
    loss.end_epoch()
    torch.testing.assert_close(loss.class_probs, 0.3 * true_means(data) + 0.7 / CLASSES)


def test_counts_in_training_mode_only():
    student, teacher, target = batches(1)[0]
    loss = IKLLoss(CLASSES).eval()
    loss(student, teacher, target)
    assert loss.class_sums.count_nonzero() == 0
    loss.train()(student, teacher, target)
    torch.testing.assert_close(loss.class_sums.sum(), torch.tensor(float(len(target))))


def test_counting_neither_changes_nor_keeps_the_graph():
    student, teacher, target = batches(1)[0]
    student.requires_grad_()
    teacher.requires_grad_()
    loss = IKLLoss(CLASSES)
    value = loss(student, teacher, target)
    loss.end_epoch()
    value.backward()  # the means have changed in place since the forward
    expected = ikl_loss(student, teacher, torch.full((CLASSES, CLASSES), 1 / CLASSES), target)
    torch.testing.assert_close(student.grad, torch.autograd.grad(expected, student)[0])
    assert not loss.class_sums.requires_grad
    assert not loss.class_probs.requires_grad


def test_sample_wise_needs_no_target_and_has_no_state():
    student, teacher, target = batches(1)[0]
    loss = IKLLoss(class_wise=False, weight_temperature=100.0)
    expected = ikl_loss(student, teacher, weight_temperature=100.0)
    for value in (loss(student, teacher), loss(student, teacher, target)):
        assert value == expected
    loss.end_epoch()
    assert not loss.state_dict()
    assert loss.num_classes is None


def test_reset():
    student, teacher, target = batches(1)[0]
    loss = IKLLoss(CLASSES)
    loss(student, teacher, target)
    loss.end_epoch()
    loss(student, teacher, target)
    loss.reset_class_probs()
    assert (loss.class_probs == 1 / CLASSES).all()
    assert loss.class_sums.count_nonzero() == 0


class TestState:
    def half_way(self, **options) -> IKLLoss:
        loss = IKLLoss(CLASSES, **options)
        first, second = batches(2)
        loss(*first)
        loss.end_epoch()
        loss(*second)
        return loss

    @pytest.mark.parametrize("num_classes", [None, CLASSES])
    @pytest.mark.parametrize("assign", [False, True])
    def test_resumes_in_the_middle_of_an_epoch(self, num_classes, assign):
        loss = self.half_way()
        file = io.BytesIO()
        torch.save(nn.Sequential(loss).state_dict(), file)
        file.seek(0)
        other = IKLLoss(num_classes)
        nn.Sequential(other).load_state_dict(torch.load(file, weights_only=True), assign=assign)
        for part in (loss, other):
            part(*batches(1, seed=5)[0])
            part.end_epoch()
        assert torch.equal(other.class_probs, loss.class_probs)

    @pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
    def test_copies_are_apart(self, copy_of):
        loss = self.half_way()
        sums = loss.class_sums.clone()
        twin = copy_of(loss)
        twin(*batches(1)[0])
        assert torch.equal(loss.class_sums, sums)
        assert not torch.equal(twin.class_sums, sums)

    def test_keys(self):
        assert set(self.half_way().state_dict()) == {"class_probs", "class_sums"}

    def test_state_of_another_size_is_refused(self):
        with pytest.raises(RuntimeError, match=r"class_probs[\s\S]*class_sums"):
            IKLLoss(CLASSES + 1).load_state_dict(self.half_way().state_dict())

    def test_missing_sums_are_refused(self):
        state = self.half_way().state_dict()
        del state["class_sums"]
        with pytest.raises(RuntimeError, match="class_sums"):
            IKLLoss(CLASSES).load_state_dict(state)

    def test_size_comes_from_the_first_logits(self):
        data = batches()
        loss, sized = IKLLoss(), IKLLoss(CLASSES)
        assert loss.num_classes is None
        loss.end_epoch()
        loss.reset_class_probs()
        for batch in data:
            assert loss(*batch) == sized(*batch)
        loss.end_epoch()
        sized.end_epoch()
        assert torch.equal(loss.class_probs, sized.class_probs)
        assert loss.num_classes == CLASSES

    def test_size_may_come_from_a_validation_step(self):
        loss = IKLLoss().eval()
        with torch.inference_mode():
            loss(*batches(1)[0])
        loss.train()(*batches(1)[0])
        loss.end_epoch()
        torch.testing.assert_close(loss.class_probs, true_means(batches(1)))

    def test_size_is_not_taken_from_logits_that_do_not_fit(self):
        loss = IKLLoss()
        with pytest.raises(ValueError, match="teacher_logits"):
            loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
        assert loss.num_classes is None

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_sums_do_not_stall_in_half_precision(self, dtype):
        torch.set_default_dtype(dtype)
        try:
            loss = nn.Sequential(IKLLoss(2)).to(dtype)[0]
        finally:
            torch.set_default_dtype(torch.float32)
        teacher, target = torch.zeros(1000, 2, dtype=dtype), torch.zeros(1000, dtype=torch.long)
        for _ in range(5):
            loss.update(teacher, target)
        assert loss.class_sums[0, 0] == 2500
        assert loss.class_probs.dtype == torch.float32

    def test_moves_and_casts_as_one(self):
        loss = self.half_way().double()
        assert loss.class_probs.dtype == loss.class_sums.dtype == torch.float64
        there = copy.deepcopy(loss).to("meta")
        assert there.class_probs.device.type == there.class_sums.device.type == "meta"


def test_the_host_never_waits():
    loss = IKLLoss(CLASSES)
    with NoSync():
        loss(*batches(1)[0])
        loss.end_epoch()


def test_compiles_whole():
    loss, plain = IKLLoss(CLASSES), IKLLoss(CLASSES)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for batch in batches(2):
        assert compiled(*batch) == plain(*batch)
    torch.testing.assert_close(loss.class_sums, plain.class_sums)


def test_repr_reads_like_the_constructor_call():
    assert repr(IKLLoss(10, gamma=0.3, normalization="weight")) == (
        "IKLLoss(num_classes=10, normalization='weight', gamma=0.3)"
    )
    assert repr(IKLLoss()) == "IKLLoss()"


BAD_ARGUMENTS = {
    "num_classes": 0,
    "normalization": "class",
    "gamma": -1.0,
    "temperature": 0.0,
    "weight_temperature": -1.0,
    "class_momentum": 1.5,
}


@pytest.mark.parametrize(("name", "value"), BAD_ARGUMENTS.items())
def test_bad_arguments_are_refused_at_once(name, value):
    with pytest.raises(ValueError, match=f"`{name}`.*{value}"):
        IKLLoss(**{name: value})


def test_bad_input():
    student, teacher, target = batches(1)[0]
    with pytest.raises(ValueError, match="`target` is missing"):
        IKLLoss(CLASSES)(student, teacher)
    with pytest.raises(ValueError, match="class_probs"):
        IKLLoss(CLASSES + 1)(student, teacher, target)
    with pytest.raises(ValueError, match="`logits`"):
        IKLLoss().update(teacher[0], target)


class Student(nn.Module):
    """Holds its loss, as a LightningModule does: DistributedDataParallel then sees the loss's buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.loss = IKLLoss()

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.scale * student, teacher, target)


def means_on(rank: int) -> Tensor:
    """The class means of one of two processes, each with its half of every batch."""
    module = nn.parallel.DistributedDataParallel(Student())
    for batch in batches():
        module(*(part.chunk(2)[rank] for part in batch)).backward()
    module.module.loss.end_epoch()
    return module.module.loss.class_probs


def test_two_processes_learn_the_means_of_one():
    for means in on_ranks(means_on):
        torch.testing.assert_close(means, true_means(batches()))
