"""Loading, encoding, decoding, and the errors of each."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fairlead import demo
from fairlead.errors import CheckpointError, ModelNotFoundError, RequestError, UnsupportedModelError
from fairlead.tokenization.tokenizer import Tokenizer, load_tokenizer


def demo_copy(target: Path, **config: object) -> Path:
    """The demo's tokenizer files with other entries in tokenizer_config.json."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.path() / name, target / name)
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def test_importing_and_loading_the_demo_needs_no_torch() -> None:
    code = (
        "import sys, fairlead.engine.output_processor, fairlead.tokenization.chat_template\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "from fairlead import demo\n"
        "from fairlead.tokenization.tokenizer import load_tokenizer\n"
        "load_tokenizer(demo.path())\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_backend_encodes_and_decodes_as_transformers_does(tokenizer: Tokenizer) -> None:
    reference = tokenizer.transformers_tokenizer
    for text in ("", "hello world", " a  b\n", "naïve 日本 🙂", "<s>a</s>"):
        for special in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=special)
            assert ids == reference.encode(text, add_special_tokens=special)
            assert [ids, ids] == tokenizer.encode_batch([text, text], add_special_tokens=special)
            assert tokenizer.decode(ids, skip_special_tokens=special) == reference.decode(
                ids, skip_special_tokens=special, clean_up_tokenization_spaces=False
            )


def test_the_demo_has_what_its_files_say(demo_tokenizer: Tokenizer) -> None:
    assert demo_tokenizer.vocab_size == 1024
    assert demo_tokenizer.eos_token_ids == (3,)
    assert demo_tokenizer.added_tokens["<|user|>"] is True


def test_autotokenizer_gives_the_demo_the_same_tokenizer(demo_tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(str(demo.path()))
    assert type(other) is type(demo_tokenizer.transformers_tokenizer)
    assert other.backend_tokenizer.to_str() == demo_tokenizer.backend.to_str()


def test_token_text_is_the_text_in_the_middle(spm_tokenizer: Tokenizer, demo_tokenizer: Tokenizer) -> None:
    he = spm_tokenizer.backend.token_to_id("▁he")
    assert (spm_tokenizer.token_text(he), spm_tokenizer.token_bytes(he)) == (" he", b" he")
    byte = spm_tokenizer.backend.token_to_id("<0xF0>")
    assert (spm_tokenizer.token_text(byte), spm_tokenizer.token_bytes(byte)) == ("\ufffd", b"\xf0")
    assert demo_tokenizer.token_text(3) == "<|end|>"
    assert demo_tokenizer.token_text(10**6) == ""


@pytest.mark.parametrize("text", ["plain text", "naïve 日本 🙂", " x"])
@pytest.mark.parametrize("name", ["demo", "sentencepiece", "llama-spm"])
def test_token_bytes_add_up_to_the_text(tokenizer_named: Callable[[str], Tokenizer], name: str, text: str) -> None:
    tokenizer = tokenizer_named(name)
    ids = tokenizer.encode_continuation(text)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text


def test_a_lone_surrogate_is_a_request_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="lone surrogate"):
        tokenizer.encode("a\ud800b")
    with pytest.raises(RequestError, match="lone surrogate"):
        tokenizer.encode_batch(["a", "\udfff"])


def test_settings_of_the_file_neither_cut_nor_pad(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend

    demo_copy(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("one two three four five")) > 2
    assert len(load_tokenizer(tmp_path).encode("a")) == 1


def test_a_directory_without_tokenizer_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"looked for tokenizer\.json, .*--tokenizer.*--skip-tokenizer-init"):
        load_tokenizer(tmp_path)


def test_a_missing_directory_is_not_taken_for_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is not a directory"):
        load_tokenizer(tmp_path / "nowhere")


def test_an_unknown_id_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="no tokenizer found for nobody/nothing"):
        load_tokenizer("nobody/nothing")


def test_a_broken_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    demo_copy(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


CANARY = {"AutoTokenizer": [None, "canary.CanaryTokenizer"]}


def test_a_tokenizer_that_needs_its_own_code_is_refused(tmp_path: Path) -> None:
    demo_copy(tmp_path, tokenizer_class="CanaryTokenizer", auto_map=CANARY)
    (tmp_path / "canary.py").write_text("raise SystemExit('the canary sang')\n")
    with pytest.raises(UnsupportedModelError, match="its own code, which is not run"):
        load_tokenizer(tmp_path)


def test_code_beside_a_known_tokenizer_is_not_run(tmp_path: Path, demo_tokenizer: Tokenizer) -> None:
    demo_copy(tmp_path, auto_map=CANARY)
    (tmp_path / "canary.py").write_text("raise SystemExit('the canary sang')\n")
    assert load_tokenizer(tmp_path).encode("hello") == demo_tokenizer.encode("hello")


def test_a_decoder_that_cannot_be_streamed_is_refused() -> None:
    from tokenizers import decoders

    loaded = load_tokenizer(demo.path()).transformers_tokenizer
    loaded.backend_tokenizer.decoder = decoders.Sequence([decoders.Replace("~", "-"), decoders.ByteLevel()])
    with pytest.raises(UnsupportedModelError, match="mixes ByteLevel with others: Replace, ByteLevel"):
        Tokenizer(loaded, source="x")


def test_a_tokenizer_without_fast_form_is_refused() -> None:
    class Slow:
        eos_token_id = 1

    with pytest.raises(UnsupportedModelError, match="no fast form"):
        Tokenizer(Slow(), source="x")
