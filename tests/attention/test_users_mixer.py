"""A mixer of the user's own is one like any other; what is wrong with it is told before anything is trained."""

from pathlib import Path

import pytest
import torch
from courses import assert_same_course, mean_over_ranks, train_under_zero
from small_models import Case

from megaresid import variants
from megaresid.errors import UserError
from megaresid.model.check import check_states, check_users_mixers, complete_rules
from megaresid.model.describe_mixers import describe_mixer
from megaresid.model.flops import forward_flops_per_token
from megaresid.model.gpt import GPT, build
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape
from megaresid.users_code import mistakes_told

SHAPE = ModelShape(layers=3, heads=2, width=16, context=8, vocab_size=40, end_of_text=39)


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)


def checked(attention: str, documents: bool = False) -> None:
    """What training does with a plan before it allocates anything."""
    with mistakes_told():
        plan = ModelPlan(SHAPE, attention, documents=documents)
        check_states(plan)
        check_users_mixers(plan)
        with torch.device("meta"):
            model = GPT(plan)
        complete_rules(model)
        forward_flops_per_token(plan)


def test_it_is_used_and_written_like_one_of_ours():
    plan = ModelPlan(SHAPE, "2*users_mixers:Mean(start=0.5) + blend(users_mixers:Mean, causal_conv)")
    mean = {"name": "users_mixers:Mean", "start": 0.5}
    assert [layer["attention"] for layer in plan.tree()["layers"][:2]] == [mean, mean]
    assert plan.tree()["layers"][2]["attention"]["a"] == mean | {"start": 1.0}
    checked("2*users_mixers:Mean(start=0.5) + blend(users_mixers:Mean, causal_conv)")
    model = build(plan, seed=0)
    mixer, x = model.parts[2].attention.double(), torch.randn(2, 8, 16, dtype=torch.float64)
    assert set(mixer.gain.tolist()) == {0.5}
    means = torch.stack([x[:, : t + 1].mean(1) for t in range(8)], 1)
    torch.testing.assert_close(mixer(x, ())[0], 0.5 * means @ mixer.o_proj.weight.T, rtol=1e-12, atol=1e-12)
    assert mixer.o_proj.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.2)  # 256 draws


def test_it_trains_under_zero_as_in_a_plain_loop(ranks2, tmp_path):
    case = Case("vanilla", "users_mixers:Mean(start=0.5)", layers=2, step=0)
    assert_same_course(mean_over_ranks(*ranks2.run(train_under_zero, case, 2, str(tmp_path))), case)


def test_it_is_described(capsys):
    found = describe_mixer("users_mixers:Mean(start=2)", SHAPE)
    (option,) = found.options
    assert (found.name, found.paper, found.fidelity) == ("users_mixers:Mean", "me", "own")
    assert (option.name, option.type, option.value, option.default) == ("start", "float", 2.0, 1.0)
    assert found.added_parameters == 3 * (16 + 16 * 16 - 4 * (16 * 16 + 16))
    assert found.added_flops == 3 * (2 * 16 * 16 - 4 * 2 * 16 * 16 - 4 * 16 * 4.5)
    assert (found.decodes, found.carried_bytes, found.carried_bytes_a_token) == (False, None, None)
    assert found.incompatible == ("residual mudd_former", "--separate-documents")
    variants.main(["users_mixers:Mean", "--model", "tiny"])
    assert "run again for every token" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, message",
    [
        ("Mean(stat=1)", "attention 'users_mixers:Mean' has no option 'stat': did you mean 'start'?"),
        ("Mean(start=high)", "start=high is not valid"),
        ("NoMixer", "'users_mixers:NoMixer' is not a subclass of megaresid.attention.mixer:Mixer: derive it from that"),
        ("ForeignOptions", "'users_mixers:ForeignOptions': its Options are not a subclass of megaresid.spec:Options"),
        ("Nothing", "cannot import attention 'users_mixers:Nothing': module 'users_mixers' has no attribute 'Nothing'"),
        ("NoRule", "no initial value is declared for layers.00.attention.gain: let parameter_rules() of the module"),
        ("Misnamed", "Misnamed declares rules of parameters it has not: ['gian']"),
        ("Narrow", "layer 0: attention 'users_mixers:Narrow' makes [1, 2, 15] of [1, 2, 16]: let its forward return"),
        ("Late", "layer 0: attention 'users_mixers:Late' makes [1, 1, 16] of [1, 2, 16]: let its forward return"),
        ("Alone", "'users_mixers:Alone' does not return the pair (y, side), where side is a tuple: let its forward"),
        ("Undeclared", "gives a side channel of shapes ([16]) after [B, T], and its side_spec promises ()"),
        ("Promised", "gives a side channel of shapes () after [B, T], and its side_spec promises (extra[3])"),
        ("Ahead", "layer 0: attention 'users_mixers:Ahead' is not causal: other tokens from 5 on change its outputs"),
        ("Double", "layer 0: attention 'users_mixers:Double' makes torch.float64 of torch.float32: let its forward"),
        ("Forgetful", "'users_mixers:Forgetful' says that it decodes, and makes something else of a text"),
        ("WithoutCache", "users_mixers.py, class WithoutCache: TypeError: WithoutCache.forward() takes 3 positional"),
        ("Wrong", "users_mixers.py, line "),
        ("OfAnotherInterface", "users_mixers.py, class OfAnotherInterface: TypeError: OfAnotherInterface.__init__()"),
        ("Idle", "attention 'users_mixers:Idle' has no forward(x, side, cache=None): give it one"),
        ("Costless", "'users_mixers:Costless' does not say what it costs: give it a classmethod flops_per_token"),
    ],
)
def test_mistakes_are_told_in_one_line(name, message):
    with pytest.raises(UserError) as caught:
        checked(f"users_mixers:{name}")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_mistake_in_a_later_layer_is_found():
    with pytest.raises(UserError, match="layer 2: attention 'users_mixers:Narrow'"):
        checked("softmax | users_mixers:Free | users_mixers:Narrow")


def test_a_fault_of_the_projects_own_stays_whole():
    with pytest.raises(ZeroDivisionError), mistakes_told():
        raise ZeroDivisionError


def test_a_future_token_inside_a_composition_is_seen_too():
    with pytest.raises(UserError, match="is not causal"):
        checked("blend(users_mixers:Ahead, causal_conv)")


def test_the_check_draws_no_random_number_of_the_runs():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    checked("users_mixers:Mean")
    assert torch.equal(torch.rand(2), expected)


def test_a_mixer_that_claims_to_keep_documents_apart_must():
    checked("users_mixers:Deaf")
    with pytest.raises(UserError, match="'users_mixers:Deaf' reads the documents and does not keep them apart"):
        checked("users_mixers:Deaf", documents=True)


def test_of_an_own_mixer_around_ours_all_of_it_is_checked():
    checked("blend(users_mixers:Mean, causal_conv)")
    with pytest.raises(UserError, match="does not keep them apart"):
        checked("blend(users_mixers:Deaf, causal_conv)", documents=True)
