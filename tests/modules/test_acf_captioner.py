import functools
import itertools
import math

import pytest
import torch
from torch import nn

from lightning_methods.functional import caption_mask, masked_token_nll, prefix_mask_rows, self_critical_loss
from lightning_methods.modules import ACFCaptioner, ACFDecoder, ACFEncoder, ClusterState

close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)

END, MASK = 5, 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def captioner(**options):
    settings = {
        "end_id": END,
        "feature_dim": 6,
        "grid_size": (2, 4),
        "embed_dim": 8,
        "num_heads": 2,
        "ffn_dim": 12,
        "num_plain": 1,
        "num_grouped": 2,
        "num_decoder_layers": 2,
        "max_length": 3,
    }
    return ACFCaptioner(6, **{**settings, **options}).eval()


def features(batch=2):
    return torch.randn(batch, 8, 6)


class TestParts:
    def test_encoder_clusters_see_the_residual_stream(self):
        encoder = ACFEncoder((2, 4), 8, 2, 12, num_plain=1, num_grouped=2, dropout=0.0)
        x = torch.randn(2, 8, 8)
        seen = []
        for layer in encoder.layers[1:]:
            layer.self_attn.clusters.cluster.register_forward_pre_hook(lambda _, args: seen.append(args))
        y = encoder.layers[0](x, ClusterState())
        encoder(x)
        close(seen[0][0], y)
        assert len(seen[0]) == 1  # nothing is handed on to the first layer with clusters
        assert len(seen[1]) == 3
        assert isinstance(encoder.layers[0].self_attn, nn.MultiheadAttention)

    def test_decoder_is_causal_and_normalised(self):
        decoder = ACFDecoder(11, 8, 2, 12, num_layers=2, dropout=0.0)
        tokens, memory = torch.randint(11, (2, 6)), torch.randn(2, 4, 8)
        logprobs = decoder(tokens, memory)
        close(logprobs.exp().sum(-1), torch.ones(2, 6))
        changed = tokens.clone()
        changed[:, 4:] = (changed[:, 4:] + 1) % 11
        other = decoder(changed, memory)
        close(other[:, :4], logprobs[:, :4])
        assert not torch.allclose(other[:, 4:], logprobs[:, 4:])
        assert not torch.allclose(
            decoder(changed, memory, causal=False)[:, :4], decoder(tokens, memory, causal=False)[:, :4]
        )

    def test_masked_tokens_are_not_seen(self):
        decoder = ACFDecoder(11, 8, 2, 12, num_layers=2, dropout=0.0)
        tokens, memory = torch.randint(11, (2, 6)), torch.randn(2, 4, 8)
        mask = torch.tensor([[1, 1, 1, 1, 0, 0]]).expand(2, 6)
        for causal in (True, False):
            found = decoder(tokens, memory, token_mask=mask, causal=causal)[:, :4]
            close(found, decoder(tokens[:, :4], memory, causal=causal))

    def test_positions_and_scale(self):
        decoder = ACFDecoder(11, 8, 2, 12, num_layers=0, dropout=0.0)
        tokens = torch.tensor([[3, 3, 7]])
        waves = torch.zeros(3, 8)
        for place, pair in itertools.product(range(3), range(4)):
            angle = place / 10000 ** (2 * pair / 8)
            waves[place, 2 * pair], waves[place, 2 * pair + 1] = math.sin(angle), math.cos(angle)
        x = decoder.embedding(tokens) * math.sqrt(8) + waves
        close(decoder(tokens, torch.zeros(1, 4, 8)), decoder.head(decoder.norm(x)).log_softmax(-1))

    def test_matrices_start_xavier_uniform_each(self):
        for name, matrix in captioner(embed_dim=64).named_parameters():
            if matrix.ndim > 1:
                for part in matrix.chunk(3) if "in_proj" in name else [matrix]:
                    assert part.abs().max().item() == pytest.approx(math.sqrt(6 / sum(part.shape)), rel=0.2), name

    def test_every_parameter_takes_part(self):
        model = captioner(dropout=0.0, feature_dropout=0.0)
        tokens = torch.tensor([[0, 1, 2, END], [0, 3, END, END]])
        model(features(), tokens).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "in_proj_bias" not in name)


def judge(model, memory):
    """The log-probability of a caption, word by word from the decoder; prefixes are decoded once."""

    @functools.cache
    def following(prefix):
        tokens = torch.tensor([prefix])
        with torch.no_grad():
            if model.mask_id is None:
                return model.decoder(tokens, memory)[0, -1].tolist()
            masked = torch.cat([tokens, torch.tensor([[model.mask_id]])], 1)
            return model.decoder(masked, memory, causal=False)[0, -1].tolist()

    def score(words):
        words = words[: words.index(END) + 1] if END in words else words
        return sum(following((0, *words[:place]))[word] for place, word in enumerate(words))

    return score


def all_captions():
    for length in range(1, 4):
        for words in itertools.product([w for w in range(6) if w != END], repeat=length - 1):
            for last in range(6):
                if last == END or length == 3:
                    yield [*words, last]


@pytest.mark.parametrize("mask_id", [None, MASK])
class TestWriting:
    def test_a_wide_beam_finds_the_best(self, mask_id):
        model, images = captioner(mask_id=mask_id), features()
        found = model.beam_search(images, beam_size=200)
        memory = model.encode(images)
        for row in range(2):
            score = judge(model, memory[row : row + 1])
            best = max(all_captions(), key=score)
            assert found.tokens[row].tolist() == best + [END] * (3 - len(best))
            assert found.logprobs[row].sum().item() == pytest.approx(score(best), abs=1e-4)

    def test_one_beam_is_greedy(self, mask_id):
        model, images = captioner(mask_id=mask_id), features(4)
        one, greedy = model.beam_search(images, 1), model.greedy(images)
        assert torch.equal(one.tokens, greedy.tokens)
        close(one.logprobs, greedy.logprobs)
        memory = model.encode(images)
        for row in range(4):
            words = greedy.tokens[row].tolist()
            assert greedy.logprobs[row].sum().item() == pytest.approx(
                judge(model, memory[row : row + 1])(words), abs=1e-4
            )

    def test_sampling(self, mask_id):
        model, images = captioner(mask_id=mask_id), features(1)
        with torch.no_grad():
            captions = model.sample(images, 3000, generator=torch.Generator().manual_seed(0))
        memory = model.encode(images)
        counts: dict[tuple[int, ...], int] = {}
        for row in captions.tokens.tolist():
            words = tuple(row[: row.index(END) + 1] if END in row else row)
            assert all(word == END for word in row[len(words) :])
            counts[words] = counts.get(words, 0) + 1
        for words in sorted(counts, key=counts.get)[-5:]:
            probability = math.exp(judge(model, memory)(words))
            assert counts[words] / 3000 == pytest.approx(probability, abs=0.03)

    def test_sampled_captions_train(self, mask_id):
        model, images = captioner(mask_id=mask_id), features()
        captions = model.sample(images, 2)
        assert captions.tokens.shape == (4, 3)
        mask = caption_mask(captions.tokens, END)
        assert captions.logprobs[~mask].eq(0).all()
        self_critical_loss(captions.logprobs, torch.tensor([1.0, 0, 0, 2]), mask, num_samples=2).backward()
        assert model.decoder.head.weight.grad.abs().sum() > 0
        memory = model.encode(images).repeat_interleave(2, 0)
        for row in range(4):
            words = captions.tokens[row].tolist()
            assert captions.logprobs[row].sum().item() == pytest.approx(
                judge(model, memory[row : row + 1])(words), abs=1e-4
            )


def test_causal_training_learns_captions():
    model = captioner(dropout=0.0, feature_dropout=0.0).train()
    images, tokens = features(), torch.tensor([[0, 1, 2, END], [0, 3, END, END]])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = masked_token_nll(model(images, tokens[:, :-1]), tokens[:, 1:], caption_mask(tokens[:, 1:], END))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert torch.equal(model.eval().greedy(images).tokens, tokens[:, 1:])


def test_the_authors_rows_train_what_generation_asks_for():
    model = captioner(mask_id=MASK)
    images, tokens = features(), torch.tensor([[0, 1, 2, END], [0, 3, END, END]])
    rows = prefix_mask_rows(tokens, mask_id=MASK, end_id=END)
    logprobs = model(images, rows.inputs, token_mask=rows.input_mask, index=rows.index)
    total = masked_token_nll(logprobs, rows.targets, rows.target_mask, reduction="sum").item()
    memory = model.encode(images)
    expected = judge(model, memory[:1])([1, 2, END]) + judge(model, memory[1:])([3, END])
    assert total == pytest.approx(-expected, abs=1e-4)


BAD_CALLS = {
    "end": (lambda: captioner(end_id=6), r"end_id.*\[0, 5\].*6"),
    "mask": (lambda: captioner(mask_id=-1), "mask_id.*-1"),
    "length": (lambda: captioner(max_length=0), "max_length.*0"),
    "heads": (lambda: captioner(num_heads=3), "`num_heads` must divide embed_dim 8, got 3"),
    "beam": (lambda: captioner().beam_search(features(), 0), "beam_size.*0"),
    "samples": (lambda: captioner().sample(features(), 0), "num_samples.*0"),
    "features": (lambda: captioner().greedy(features()[:, :5]), "grid of 2 x 4.*5 tokens"),
    "memory": (
        lambda: captioner().decoder(torch.zeros(2, 3, dtype=torch.long), torch.zeros(1, 4, 8)),
        r"memory.*\(2, any, 8\).*\(1, 4, 8\)",
    ),
}


@pytest.mark.parametrize(("bad", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
