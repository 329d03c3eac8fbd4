import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_methods.functional import proreg_loss
from lightning_methods.modules import PromptClassifier, PromptTeacher, ProRegLoss, prompt_param_groups

close = torch.testing.assert_close


def features(samples=6, size=5, seed=0):
    return torch.randn(samples, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TEXT = 3 * features(4, 5, seed=1)


def cosines(x, text, scale):
    """One image and one class at a time."""
    return torch.stack([torch.stack([scale * (one @ word) / (one.norm() * word.norm()) for word in text]) for one in x])


class TestLoss:
    def test_is_the_function_with_its_settings(self):
        logits, prompts = features(6, 4, seed=2), features(6, 4, seed=3)
        target = torch.tensor([0, 1, 2, 3, 0, -1])
        settings = {
            "alpha": 1.5,
            "weighting": "loss",
            "gamma": 0.5,
            "prompt_power": 3.0,
            "constant_weight": 0.3,
            "temperature": 2.0,
            "eps": 1e-3,
            "entropy_offset": True,
            "ignore_index": -1,
            "reduction": "none",
        }
        for name, value in settings.items():
            some = {"ignore_index": -1, name: value}
            close(ProRegLoss(**some)(logits, prompts, target), proreg_loss(logits, prompts, target, **some))
        close(ProRegLoss(**settings)(logits, prompts, target), proreg_loss(logits, prompts, target, **settings))

    def test_reads_like_the_constructor_call(self):
        assert repr(ProRegLoss()) == "ProRegLoss()"
        assert repr(ProRegLoss(alpha=2.0, weighting="loss")) == "ProRegLoss(alpha=2.0, weighting='loss')"

    def test_has_no_state_and_copies(self):
        loss = pickle.loads(pickle.dumps(copy.deepcopy(ProRegLoss(alpha=2.0))))
        assert loss.settings["alpha"] == 2.0
        assert not loss.state_dict()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"alpha": -1.0}, "`alpha`"),
            ({"weighting": "both"}, "`weighting`"),
            ({"gamma": 0.0}, "`gamma`"),
            ({"prompt_power": 0.0}, "`prompt_power`"),
            ({"constant_weight": 2.0}, "`constant_weight`"),
            ({"temperature": -1.0}, "`temperature`"),
            ({"eps": -1.0}, "`eps`"),
            ({"reduction": "median"}, "`reduction`"),
        ],
    )
    def test_refuses_settings_when_made(self, settings, message):
        with pytest.raises(ValueError, match=message):
            ProRegLoss(**settings)


class TestClassifier:
    @pytest.mark.parametrize("trainable", [False, True])
    def test_begins_as_the_zero_shot_classifier(self, trainable):
        x = 7 * features()
        close(PromptClassifier(TEXT, logit_scale=20.0, trainable=trainable)(x), cosines(x, TEXT, 20.0))

    @pytest.mark.parametrize("trainable", [False, True])
    def test_several_prompts_are_averaged_as_directions(self, trainable):
        prompts = torch.stack([TEXT, 5 * features(4, 5, seed=4)], 1)
        mean = F.normalize(prompts, dim=-1).mean(1)
        found = PromptClassifier(prompts, logit_scale=3.0, trainable=trainable)(features())
        close(found, cosines(features(), mean, 3.0))

    def test_what_learns(self):
        head, frozen = PromptClassifier(TEXT, trainable=True), PromptClassifier(TEXT)
        assert dict(head.named_parameters()).keys() == {"weight", "log_scale"}
        close(head.weight.detach(), TEXT)  # norms as given
        assert not list(frozen.parameters())
        x = features().requires_grad_()
        head(x).square().sum().backward()
        assert all(value.grad.abs().max() > 0 for value in (head.weight, head.log_scale, x))
        assert frozen(x).requires_grad  # to the features
        for rows in (TEXT, torch.stack([TEXT, TEXT], 1)):  # what is given stays as it is
            before = rows.clone()
            head = PromptClassifier(rows, trainable=True)
            with torch.no_grad():
                head.weight.zero_()
            assert torch.equal(rows, before)

    def test_a_trained_head_loads_into_a_frozen_one_and_back(self):
        head, frozen = PromptClassifier(TEXT, trainable=True), PromptClassifier(torch.ones_like(TEXT))
        with torch.no_grad():
            head.weight.add_(features(4, 5, seed=5))
            head.log_scale.sub_(1.0)
        frozen.load_state_dict(head.state_dict())
        close(frozen(features()), head(features()).detach())
        again = PromptClassifier(torch.ones_like(TEXT), trainable=True)
        again.load_state_dict(frozen.state_dict())
        close(again(features()), head(features()))

    def test_half_precision_features_give_float32_logits(self):
        classifier = PromptClassifier(TEXT.float(), logit_scale=100.0)
        x = features().half()
        assert classifier(x).dtype == torch.float32
        close(classifier(x), cosines(x.float(), TEXT.float(), 100.0), rtol=1e-5, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            close(classifier(x.float()), classifier(x), rtol=0, atol=0)

    def test_a_zero_vector_gives_zeros(self):
        x = torch.zeros(1, 5, dtype=torch.float64)
        for trainable in (False, True):
            assert torch.equal(PromptClassifier(TEXT, trainable=trainable)(x), torch.zeros(1, 4, dtype=torch.float64))

    def test_reads_well(self):
        assert repr(PromptClassifier(TEXT)) == "PromptClassifier(classes=4, features=5, trainable=False)"

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: PromptClassifier(TEXT[0]), r"`features` must be .*\(K, D\)"),
            (lambda: PromptClassifier(TEXT, logit_scale=0.0), "`logit_scale`"),
            (lambda: PromptClassifier(TEXT)(features(3, 4)), "number of columns .* 4 .* got 5"),
            (lambda: PromptClassifier(TEXT)(features()[0]), "`features` must be floating and of two dimensions"),
            (lambda: PromptClassifier(TEXT, trainable=True)(features(3, 4)), "number of columns .* 4 .* got 5"),
        ],
    )
    def test_bad_input_names_the_argument(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


class TestTeacher:
    @staticmethod
    def encoder():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)).double()

    def test_is_a_frozen_copy_in_eval_mode_whatever_comes(self):
        encoder = self.encoder()
        teacher = PromptTeacher(encoder, TEXT, logit_scale=10.0)
        before = copy.deepcopy(teacher.state_dict())
        x = features(6, 3)
        expected = cosines(copy.deepcopy(encoder).eval()(x), TEXT, 10.0).detach()
        for mode in (True, False):
            wrapper = nn.Sequential(teacher).train(mode)
            close(wrapper(x), expected)
        assert not any(part.training for part in teacher.modules())
        assert not any(value.requires_grad for value in teacher.parameters())
        assert not teacher(x).requires_grad
        with torch.no_grad():
            encoder[0].weight.zero_()
        close(teacher.state_dict(), before)
        assert encoder.training
        assert encoder[0].weight.requires_grad

    def test_at_the_start_it_agrees_with_the_head(self):
        encoder = self.encoder().eval()
        head = PromptClassifier(TEXT, trainable=True)
        close(PromptTeacher(encoder, TEXT)(features(6, 3)), head(encoder(features(6, 3))).detach())

    @pytest.mark.parametrize("patch", ["compiled", "wrapped", "bound"])
    def test_a_forward_on_the_instance_does_not_run_the_original(self, patch):
        encoder = nn.Sequential(nn.Linear(3, 5).double())
        inner = encoder[0]
        forward = inner.forward
        inner.forward = {
            "compiled": lambda: torch.compile(forward, backend="eager"),
            "wrapped": lambda: lambda x: forward(x),
            "bound": lambda: forward,
        }[patch]()
        teacher = PromptTeacher(encoder, TEXT)
        before = teacher(features(6, 3))
        with torch.no_grad():
            inner.weight.add_(1.0)
        close(teacher(features(6, 3)), before)
        if patch == "bound":
            assert vars(teacher.encoder[0])["forward"].__self__ is teacher.encoder[0]


class TestParamGroups:
    @staticmethod
    def net():
        return nn.ModuleDict(
            {
                "visual": nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)),
                "text": nn.Embedding(3, 5).requires_grad_(False),
                "head": PromptClassifier(TEXT.float(), trainable=True),
            }
        )

    def test_every_trained_parameter_is_in_the_right_group(self):
        net = self.net()
        groups = prompt_param_groups(net, net["head"], lr=0.1, head_lr=0.5, weight_decay=0.2)
        names = {id(value): name for name, value in net.named_parameters()}
        found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
        assert found == {
            "visual.0.weight": (0.1, 0.2),
            "visual.0.bias": (0.1, 0.0),
            "visual.1.weight": (0.1, 0.0),
            "visual.1.bias": (0.1, 0.0),
            "head.weight": (0.5, 0.2),
            "head.log_scale": (0.5, 0.0),
        }
        torch.optim.AdamW(groups, betas=(0.9, 0.98))

    def test_no_group_is_empty(self):
        net = self.net()
        net["visual"].requires_grad_(False)
        groups = prompt_param_groups(net, net["head"])
        assert [len(group["params"]) for group in groups] == [1, 1]
        assert {group["lr"] for group in groups} == {1e-3}

    @pytest.mark.parametrize("head", [nn.Linear(2, 2), PromptClassifier(TEXT)])
    def test_a_head_that_is_no_trained_part_is_refused(self, head):
        with pytest.raises(ValueError, match="`head` must be a trainable part of `module`, got"):
            prompt_param_groups(self.net(), head)
