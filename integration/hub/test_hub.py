"""Pushing to the Hub and loading from it, with the unmodified client against a Hub of our own."""

from collections.abc import Callable
from hashlib import sha256
from http.client import HTTPConnection
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow

Client = Callable[..., dict[str, Any]]

ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def card(hub: Any, repo: str) -> tuple[dict[str, Any], str]:
    """The model card on the server: its front matter and its text."""
    _, front, text = hub.files(repo)["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.fixture(scope="module")
def pushed(client: Client) -> dict[str, Any]:
    return client("push_adapter")


@pytest.fixture(scope="module")
def trained(client: Client, pushed: dict[str, Any]) -> dict[str, Any]:
    return client("train_sft")


def test_pushed_adapter_gives_same_logits_in_fresh_process(client: Client, pushed: dict[str, Any]) -> None:
    loaded = client("load_adapter")
    assert pushed["logits"] != pushed["base_logits"], "the adapter does nothing, so this test would see nothing"
    assert loaded["peft_model"] == pushed["logits"]
    assert loaded["auto_peft_model"] == pushed["logits"]
    assert loaded["base_model"] == "user/tiny-base"


def test_push_holds_the_adapter_alone(hub: Any, pushed: dict[str, Any]) -> None:
    assert hub.files("user/adapter").keys() == ADAPTER_FILES
    assert sum(map(len, hub.files("user/adapter").values())) < 100_000


def test_pushed_on_lora_is_loaded_by_the_lines_of_its_card(client: Client, hub: Any, pushed: dict[str, Any]) -> None:
    both = client("push_on_lora")
    assert hub.files("user/on-lora").keys() == ADAPTER_FILES | {f"lora-default/{name}" for name in ADAPTER_FILES}
    assert len({both["logits"]["sha256"], both["lora_logits"]["sha256"], pushed["base_logits"]["sha256"]}) == 3
    assert client("load_on_lora") == both


def test_trainer_push_gives_same_logits_in_fresh_process(client: Client, hub: Any, trained: dict[str, Any]) -> None:
    loaded = client("load_sft")
    assert hub.files("user/sft-adapter").keys() >= ADAPTER_FILES | {"tokenizer.json", "training_args.bin"}
    assert "model.safetensors" not in hub.files("user/sft-adapter")
    assert loaded["logits"] != loaded["base_logits"], "the adapter does nothing, so this test would see nothing"
    assert loaded["logits"] == trained["logits"]


def test_files_come_back_byte_for_byte(
    client: Client, hub: Any, pushed: dict[str, Any], trained: dict[str, Any]
) -> None:
    downloaded = client("download")
    assert pushed["files"].keys() == ADAPTER_FILES
    assert downloaded["user/adapter-folder"] == pushed["files"]
    assert downloaded["one_by_one"] == pushed["files"]
    assert downloaded["user/sft-adapter"] == trained["files"]
    # push_to_hub saves into a folder of its own, and starts the card from another template than save_pretrained does
    held = {name: sha256(data).hexdigest() for name, data in hub.files("user/adapter").items()}
    assert downloaded["user/adapter"] == held
    for name in ADAPTER_FILES - {"README.md"}:
        assert held[name] == pushed["files"][name]


def test_wrong_token_is_refused(client: Client, hub: Any, pushed: dict[str, Any]) -> None:
    before = hub.files("user/adapter")
    refused = client("wrong_token", token="hf_" + "0" * 32)
    for action in ("create", "upload", "download"):
        # without this very message the client takes a 401 on https:// for a missing repository
        (name, bases, status, text), *_ = refused[action]
        assert status == 401 and "HfHubHTTPError" in bases and name != "RepositoryNotFoundError", refused[action]
        assert "Invalid credentials" in text
    assert [error[:1] + error[2:3] for error in refused["no_token"]][0] == ["RepositoryNotFoundError", 401]
    assert hub.files("user/adapter") == before and "user/not-mine" not in hub.repos


def test_missing_repository_file_and_revision(client: Client, pushed: dict[str, Any], trained: dict[str, Any]) -> None:
    """PEFT wraps the client's error in a ValueError that names the file and the repository."""
    downloaded = client("download")
    for what, expected in {
        "missing_repo": "RepositoryNotFoundError",
        "missing_file": "EntryNotFoundError",
        "missing_revision": "RevisionNotFoundError",
    }.items():
        name, bases, status, _ = downloaded[what][0]
        assert expected in bases and status == 404, downloaded[what]

    outer, *behind = client("load_adapter")["missing"]
    assert outer[0] == "ValueError"
    assert "Can't find 'adapter_config.json' at 'user/nothing-here'" in outer[3]
    assert "RepositoryNotFoundError" in [error[0] for error in behind]


@pytest.mark.parametrize("repo", ["user/adapter", "user/adapter-folder"])
def test_model_card(hub: Any, pushed: dict[str, Any], repo: str) -> None:
    """push_to_hub gives PEFT a card to add to, save_pretrained none: both must tell a reader what to install."""
    front, text = card(hub, repo)
    assert front["base_model"] == "user/tiny-base"
    assert front["library_name"] == "peft"
    assert "reft" in front["tags"]
    assert "pip install peft_reft" in text


def test_trainer_model_card(hub: Any, trained: dict[str, Any]) -> None:
    """TRL writes a card of its own over the adapter's: what must survive is what the Hub shows and searches by."""
    front, _ = card(hub, "user/sft-adapter")
    assert front["base_model"] == "user/tiny-base"
    assert "reft" in front["tags"]


def test_trainer_model_card_completed(hub: Any, trained: dict[str, Any]) -> None:
    """Pushing the trainer's model after the trainer keeps TRL's card and adds what PEFT and ReFT have to say."""
    front, text = card(hub, "user/sft-adapter-completed")
    assert front["base_model"] == "user/tiny-base" and front["library_name"] == "peft"
    assert {"reft", "trl", "sft"} <= set(front["tags"])
    assert "pip install peft_reft" in text and "TRL" in text


def test_server_refuses_upload_that_is_not_what_was_announced(hub: Any) -> None:
    """Else the comparisons of files above could pass on a server that mixes objects up."""
    connection = HTTPConnection("127.0.0.1", hub.server_port)
    good, other = sha256(b"weights").hexdigest(), sha256(b"other weights").hexdigest()
    for oid, signature, expected in (
        (good, hub.signature, 200),
        (other, hub.signature, 400),
        (other, "unsigned", 403),
    ):
        connection.request("PUT", f"/lfs/{signature}/{oid}", body=b"weights")
        response = connection.getresponse()
        response.read()
        assert response.status == expected
    connection.close()
    assert good in hub.objects and other not in hub.objects


def test_server_knew_every_request(client: Client, hub: Any, pushed: dict[str, Any], trained: dict[str, Any]) -> None:
    """A route that is missing here reads as a 404 to the client, which may then take another road in silence."""
    client("load_adapter"), client("load_sft"), client("download")
    assert hub.unknown == []
    weights = [path for method, path, status in hub.requests if method == "PUT" and status == 200]
    assert len(weights) >= 3, "the base and both adapters must have gone up through LFS"
