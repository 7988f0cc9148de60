"""Models that a stranger may bring are exact or refused, never wrong: in float64, in Linen and in NNX."""

import pytest
from programs import Program
from running import APIS, example, worst
from strangers import EXACT, MISDESCRIBED, REFUSED, WELL, well_described

import prenorm_jax as pn

pytestmark = pytest.mark.slow  # on one Python

every_api = pytest.mark.parametrize("api", APIS)


def loaded(api, body):
    model, x = APIS[api](Program(body)), example(Program(body))
    params = model.params(x)
    return model, params, x


@every_api
@pytest.mark.parametrize("name", EXACT)
def test_exact(name, api):
    stranger = EXACT[name]
    model, params, x = loaded(api, stranger.body)
    expected = model.run(params, x)
    for form in stranger.forms:
        assert worst(model.converted([stranger.spec], form)(params, x), expected) <= 1e-10, form
    assert worst(model.control(params, [stranger.spec], x), expected) > 1e-3
    converted = model.converted([stranger.spec], "rms")
    if stranger.decided:
        with pytest.raises(pn.LayoutError, match=r"pass\s+converted=|converted=\.\.\. decides"):
            stranger.spec.check(model.run, params, x)
        stranger.spec.check(model.run, params, x, converted=converted)
    else:
        stranger.spec.check(model.run, params, x)


@every_api
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, api):
    stranger = REFUSED[name]
    model, params, x = loaded(api, stranger.body)
    converted = model.converted([stranger.spec], "rms") if stranger.by == "converted" else None
    refuses = {
        "description": lambda: stranger.spec.resolve(params),
        "transform": lambda: pn.to_pre_rmsnorm(params, stranger.spec),
        "check": lambda: stranger.spec.check(model.run, params, x),
        "converted": lambda: stranger.spec.check(model.run, params, x, converted=converted),
    }
    with pytest.raises(pn.LayoutError, match=stranger.says) as error:
        refuses[stranger.by]()
    assert "\n" not in str(error.value)


@every_api
def test_well_described(api):
    model, params, x = loaded(api, well_described)
    WELL.check(model.run, params, x)
    for form in ("rms", "drop", "packed"):
        assert worst(model.converted([WELL], form)(params, x), model.run(params, x)) <= 1e-10, form


@every_api
@pytest.mark.parametrize("name", MISDESCRIBED)
def test_misdescribed(name, api):
    says, spec = MISDESCRIBED[name]
    model, params, x = loaded(api, well_described)
    with pytest.raises(pn.LayoutError, match=says) as error:
        spec.check(model.run, params, x)
    assert "\n" not in str(error.value)
