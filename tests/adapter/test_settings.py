"""The plugin's options: read from two places, refused by name, rendered as a table."""

import pytest
from dsv4_kernels.activation_scale import HEADROOM
from dsv4_kernels.backends import BACKENDS
from dsv4_kernels.types import MoeShape

from vllm_dsv4_moe.settings import (
    FIELDS,
    MXFP4_BACKENDS,
    Settings,
    activations_on,
    read_settings,
    settings_table,
)


def test_nothing_given_means_the_defaults():
    assert read_settings({}, {}) == Settings()


def test_the_default_headroom_is_the_one_that_was_measured():
    assert Settings().headroom == HEADROOM


def test_mxfp4_goes_to_the_backends_that_run_it():
    shape = MoeShape(8, 8, 2, 128, 64, 1, False, weight_format="mxfp4")
    run_it = [name for name, each in BACKENDS.items() if each.unsupported_reason(shape) is None]
    assert sorted(run_it) == sorted(MXFP4_BACKENDS)


@pytest.mark.parametrize(
    ("weight_format", "backend", "found"),
    [
        ("nvfp4", "reference", "nvfp4"),
        ("nvfp4", "sm90", "bf16"),
        ("nvfp4", "sm100", "nvfp4"),
        ("mxfp4", "reference", "fp8"),
        ("mxfp4", "sm90", "fp8"),
    ],
)
def test_what_auto_multiplies_in(weight_format, backend, found):
    assert activations_on(backend, "auto", weight_format) == found


@pytest.mark.parametrize("weight_format", ["nvfp4", "mxfp4"])
def test_hopper_refuses_nvfp4_activations(weight_format):
    """Of MXFP4 experts too, whatever they might be instead; only the reference backend has both,
    where they are those of the NVFP4 experts beside them."""
    with pytest.raises(ValueError, match="activations is 'nvfp4', and the sm90 backend mult"):
        activations_on("sm90", "nvfp4", weight_format)
    assert activations_on("reference", "nvfp4", "mxfp4") == "fp8"


def test_the_command_line_wins_over_the_environment():
    environ = {"VLLM_DSV4_MOE_BACKEND": "sm90", "VLLM_DSV4_MOE_HEADROOM": "8"}
    settings = read_settings({"dsv4_moe": {"backend": "reference"}}, environ)
    assert (settings.backend, settings.headroom) == ("reference", 8.0)


def test_kubernetes_variables_of_a_service_are_no_options():
    """It sets them in every pod beside a Service; what they say of two named like this plugin."""
    environ = {
        f"VLLM_DSV4_MOE_{name}": "x"
        for service in ("", "DECODE_")
        for name in (
            f"{service}SERVICE_HOST",
            f"{service}SERVICE_PORT",
            f"{service}SERVICE_PORT_HTTP",
            f"{service}PORT",
            f"{service}PORT_8000_TCP",
            f"{service}PORT_8000_TCP_PROTO",
            f"{service}PORT_8000_TCP_ADDR",
        )
    }
    environ["VLLM_DSV4_MOE_ACTIVATIONS"] = "bf16"
    assert read_settings({}, environ) == Settings(activations="bf16")
    with pytest.raises(ValueError, match="VLLM_DSV4_MOE_PORTS is not a setting"):
        read_settings({}, {"VLLM_DSV4_MOE_PORTS": "8000"})


@pytest.mark.parametrize("value", [16, 1.0], ids=str)
def test_headroom_takes_powers_of_two(value):
    assert read_settings({"dsv4_moe": {"headroom": value}}, {}).headroom == value


BAD = {
    "unknown key": ({"bakend": "sm90"}, ["dsv4_moe.bakend", "backend", "hash_weights"]),
    "bad choice": ({"backend": "sm80"}, ["dsv4_moe.backend", "'sm80'", "reference", "sm100"]),
    "wrong type": ({"backend": 90}, ["dsv4_moe.backend", "90", "string"]),
    "true is no number": ({"headroom": True}, ["dsv4_moe.headroom", "true", "number"]),
    "headroom 3": ({"headroom": 3}, ["dsv4_moe.headroom", "3", "power of two"]),
    "headroom 0": ({"headroom": 0}, ["dsv4_moe.headroom", "power of two"]),
    "negative interval": ({"saturation_log_interval": -1}, ["saturation_log_interval", "-1"]),
    "file without a path": ({"activation_scale": "file"}, ["activation_scale_file", "'file'"]),
    "path without file": ({"activation_scale_file": "a.json"}, ["activation_scale", "'a.json'"]),
}


@pytest.mark.parametrize("given, named", BAD.values(), ids=BAD)
def test_refusal_names_what_was_given_and_what_is_allowed(given, named):
    with pytest.raises(ValueError) as refusal:
        read_settings({"dsv4_moe": given}, {})
    assert [word for word in named if word not in str(refusal.value)] == []


@pytest.mark.parametrize(
    "environ, named",
    [
        ({"VLLM_DSV4_MOE_BAKEND": "sm90"}, "VLLM_DSV4_MOE_BAKEND"),
        ({"VLLM_DSV4_MOE_HEADROOM": "much"}, "'much'"),
        ({"VLLM_DSV4_MOE_ACTIVATIONS": "int8"}, "nvfp4"),
    ],
    ids=["unknown name", "no number", "bad choice"],
)
def test_the_environment_is_held_to_the_same_rules(environ, named):
    with pytest.raises(ValueError, match=named):
        read_settings({}, environ)


def test_a_section_that_is_no_object_is_refused():
    with pytest.raises(ValueError, match="must be an object"):
        read_settings({"dsv4_moe": "sm90"}, {})


def test_the_table_has_a_row_for_every_setting():
    rows = settings_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(FIELDS)
    assert all(row.count("|") == 5 for row in rows)
