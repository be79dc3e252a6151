"""Settings: ranges, aliases, sections, and that a config never changes."""

import dataclasses
from typing import Any

import pytest

from fairlead.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    PlatformConfig,
    SchedulerConfig,
    ServerConfig,
    engine_settings,
    settings_of,
)
from fairlead.errors import ConfigError

CLASSES = (ModelConfig, CacheConfig, SchedulerConfig, PlatformConfig, ServerConfig)


def test_swap_space_is_a_number_of_gib_from_none_on() -> None:
    assert EngineConfig().cache.swap_space == 0
    assert EngineConfig.of(swap_space=0.25).cache.swap_space == 0.25
    with pytest.raises(ConfigError, match="swap_space must be at least 0, got -1"):
        EngineConfig.of(swap_space=-1)


def test_defaults_are_valid() -> None:
    config = EngineConfig()
    assert (config.model.model, config.model.dtype, config.cache.enable_prefix_caching) == ("demo", "auto", True)
    assert EngineConfig.of() == config
    assert (ServerConfig().host, ServerConfig().port) == ("127.0.0.1", 8000)


def test_flat_names_find_their_sections() -> None:
    config = EngineConfig.of(model="m", block_size=32, max_num_seqs=4, platform="cpu", op_providers=["a=b"])
    assert (config.model.model, config.cache.block_size, config.scheduler.max_num_seqs) == ("m", 32, 4)
    assert (config.platform.platform, config.platform.op_providers) == ("cpu", ("a=b",))


@pytest.mark.parametrize(
    ("alias", "value", "section", "name"),
    [
        ("gpu_memory_utilization", 0.5, "cache", "device_memory_utilization"),
        ("kv_cache_memory_bytes", 1024, "cache", "kv_cache_memory"),
        ("num_gpu_blocks_override", 8, "cache", "num_blocks"),
    ],
)
def test_other_spellings_are_accepted(alias: str, value: float, section: str, name: str) -> None:
    assert getattr(getattr(EngineConfig.of(**{alias: value}), section), name) == value


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no setting 'max_num_seq'; did you mean 'max_num_seqs'\?"):
        EngineConfig.of(max_num_seq=1)
    with pytest.raises(ConfigError, match=r"no setting 'zzz'$"):
        EngineConfig.of(zzz=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"model": ""},
        {"dtype": "float8"},
        {"load_format": "pickle"},
        {"generation_config": "other"},
        {"max_model_len": 1},
        {"max_model_len": True},
        {"max_model_len": "10"},
        {"quantization": "awq"},
        {"block_size": 0},
        {"num_blocks": 0},
        {"kv_cache_memory": 0},
        {"device_memory_utilization": 0},
        {"device_memory_utilization": 1.01},
        {"device_memory_utilization": -0.5},
        {"max_num_seqs": 0},
        {"max_num_seqs": None},
        {"max_num_batched_tokens": 0},
        {"op_providers": ("rms_norm",)},
        {"op_providers": ("a=b=c",)},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=name):
        EngineConfig.of(**settings)


@pytest.mark.parametrize("settings", [{"port": -1}, {"port": 65536}, {"log_level": "loud"}], ids=str)
def test_a_server_setting_out_of_range_is_named(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=name):
        ServerConfig(**settings)


@pytest.mark.parametrize(
    ("given", "meant"), [("half", "float16"), ("float", "float32"), ("bf16", "bfloat16"), ("auto", "auto")]
)
def test_other_names_of_dtypes(given: str, meant: str) -> None:
    assert ModelConfig(dtype=given).dtype == meant


def test_the_word_of_others_for_no_generation_config() -> None:
    assert ModelConfig(generation_config="vllm").generation_config == "fairlead"


@pytest.mark.parametrize("cls", CLASSES)
def test_a_config_is_frozen(cls: type[Any]) -> None:
    config = cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(cls)[0].name, "other")


def test_a_derived_config_is_checked_again() -> None:
    with pytest.raises(ConfigError, match="max_num_seqs"):
        dataclasses.replace(SchedulerConfig(), max_num_seqs=0)


def test_settings_have_one_name_and_one_sentence_each() -> None:
    settings = [*engine_settings(), *settings_of("server", ServerConfig)]
    names = [name for setting in settings for name in (setting.name, *setting.aliases)]
    assert len(names) == len(set(names))
    assert [s.name for s in settings if not s.help.endswith(".") or "\n" in s.help] == []
    assert [s.name for s in settings if s.positional] == ["model"]
    assert {s.section for s in settings} == {"model", "cache", "scheduler", "platform", "server"}
