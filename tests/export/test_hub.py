"""Uploading to, and loading from, a local stand-in of the Hub's API; nothing leaves this machine."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mrp_lens.edits import Edit, ProjectionEdit, SteeringEdit, load_edit
from mrp_lens.export.hub import push_to_hub
from mrp_lens.hf import attach
from tests.support.edits import projection
from tests.support.export_edits import content_of
from tests.support.families import save_family
from tests.support.hub_standin import Hub, Repository, serving

# huggingface_hub 2.4 uploads large files by an argument of its HTTP client that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN, READER, STRANGER = "hf_standin_writes", "hf_standin_reads", "hf_standin_stranger"
CARD = "---\nlibrary_name: transformers\n---\n\n# An edited model\n"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_family("llama", tmp_path_factory.mktemp("edited"))
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


@pytest.fixture
def edit_folder(tmp_path: Path) -> Path:
    projection(1).save_pretrained(tmp_path / "edit")
    (tmp_path / "edit" / "README.md").write_text(CARD, encoding="utf-8")
    return tmp_path / "edit"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No token, proxy or setting of this machine counts, and large files go by plain HTTP."""
    from huggingface_hub import close_session, constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")
    settings = {
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        "HF_STORED_TOKENS_PATH": str(tmp_path / "no-tokens"),
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    close_session()
    yield
    close_session()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    with serving(Hub(tokens={TOKEN: ("me", True), READER: ("me", False), STRANGER: ("you", True)})) as found:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, found.endpoint)
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield found


def files(hub: Hub) -> dict[str, bytes]:
    return hub.repositories["me/edited"].files


def push(folder: Path, hub: Hub, repo_id: str = "me/edited", *, token: str | None = TOKEN, **options: object) -> str:
    return push_to_hub(folder, repo_id, token=token, endpoint=hub.endpoint, **options)


def test_a_model_arrives_byte_for_byte_and_computes_the_same(model_folder: Path, hub: Hub, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    before = content_of(model_folder)
    url = push(model_folder, hub)
    arrived = hub.repositories["me/edited"]
    assert {name: content for name, content in arrived.files.items() if name != ".gitattributes"} == before
    assert arrived.large == {"model.safetensors"}
    assert url == f"{hub.endpoint}/me/edited/commit/{arrived.oid}"
    assert content_of(model_folder) == before

    for name, content in arrived.files.items():
        (tmp_path / name).write_bytes(content)
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        wanted, got = (AutoModelForCausalLM.from_pretrained(f)(tokens).logits for f in (model_folder, tmp_path))
    assert torch.equal(got, wanted)


def test_small_files_arrive_by_the_pipeline_of_hf_xet_too(
    edit_folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.large_suffix = ".nothing-is-large"
    url = push(edit_folder, hub)
    arrived = hub.repositories["me/edited"]
    assert {name: arrived.files[name] for name in content_of(edit_folder)} == content_of(edit_folder)
    assert url == f"{hub.endpoint}/me/edited/commit/{arrived.oid}"


def test_a_new_repository_is_private_unless_asked_otherwise(edit_folder: Path, hub: Hub) -> None:
    push(edit_folder, hub, "edited")  # without owner, it is the user's own
    push(edit_folder, hub, "me/shown", private=False)
    assert "edit.safetensors" in files(hub)
    assert hub.repositories["me/edited"].private is True
    assert hub.repositories["me/shown"].private is False


def test_an_existing_public_repository_is_refused_unless_that_is_meant(edit_folder: Path, hub: Hub) -> None:
    hub.repositories["me/edited"] = Repository(private=False)
    with pytest.raises(ValueError, match=r"is public.*private=False"):
        push(edit_folder, hub)
    assert list(files(hub)) == [".gitattributes"]
    push(edit_folder, hub, private=False)
    assert "edit.safetensors" in files(hub)


def test_an_existing_repository_gets_the_new_files_and_keeps_its_others(edit_folder: Path, hub: Hub) -> None:
    hub.repositories["me/edited"] = Repository(private=True)
    files(hub).update({"notes.txt": b"kept", "README.md": b"old"})
    first = push(edit_folder, hub, commit_message="Second try")
    assert files(hub)["notes.txt"] == b"kept"
    assert files(hub)["README.md"] == CARD.encode()
    assert push(edit_folder, hub) == first  # the same again makes no commit
    assert hub.repositories["me/edited"].messages == ["Second try"]


def test_weights_of_an_earlier_model_may_not_stay_beside(model_folder: Path, edit_folder: Path, hub: Hub) -> None:
    hub.repositories["me/edited"] = Repository(private=True)
    files(hub)["pytorch_model.bin"] = b"unedited"
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        push(model_folder, hub)
    assert "config.json" not in files(hub)
    push(edit_folder, hub)  # an edit is loaded by name, and may lie beside its model
    assert "edit.safetensors" in files(hub)


def test_a_branch_is_made_and_main_stays_as_it_is(edit_folder: Path, hub: Hub) -> None:
    for _ in range(2):
        push(edit_folder, hub, revision="rank-8/first")
    branches = hub.repositories["me/edited"].branches
    assert "edit.safetensors" in branches["rank-8/first"]
    assert list(branches["main"]) == [".gitattributes"]


@pytest.mark.parametrize("token", [None, "hf_no_such_token"])
def test_an_unknown_user_is_told_how_to_log_in(edit_folder: Path, hub: Hub, token: str | None) -> None:
    before = content_of(edit_folder)
    with pytest.raises(PermissionError, match=r"hf auth login.*token="):
        push(edit_folder, hub, token=token)
    assert not hub.repositories
    assert content_of(edit_folder) == before


@pytest.mark.parametrize("token", [READER, STRANGER])
def test_a_token_that_may_not_write_there_is_refused(edit_folder: Path, hub: Hub, token: str) -> None:
    with pytest.raises(PermissionError, match=r"may not write to me/edited.*permission to write"):
        push(edit_folder, hub, token=token)
    assert not hub.repositories


@pytest.mark.parametrize("token", [READER, STRANGER])
def test_a_repository_of_somebody_else_is_refused(edit_folder: Path, hub: Hub, token: str) -> None:
    hub.repositories["me/edited"] = Repository(private=False)
    with pytest.raises(PermissionError, match="may not write to me/edited"):
        push(edit_folder, hub, token=token, private=False)
    assert list(files(hub)) == [".gitattributes"]


def test_the_token_in_use_never_stands_in_the_message(edit_folder: Path, hub: Hub) -> None:
    with pytest.raises(PermissionError) as caught:
        push(edit_folder, hub, token=READER)
    assert READER not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "status", "expected"),
    [
        ("/commit/", 409, r"somebody else at the same time; try again"),
        ("/commit/", 412, r"somebody else at the same time; try again"),
        ("/commit/", 400, r"answered 400.*planted reason"),
        ("/objects/", 403, r"may not write to me/edited.*planted reason"),
        ("/preupload/", 404, r"no me/edited, or no such revision"),
    ],
)
def test_what_the_hub_refuses_halfway_is_explained(
    model_folder: Path, hub: Hub, where: str, status: int, expected: str
) -> None:
    hub.answers[where] = (status, "planted reason")
    before = content_of(model_folder)
    with pytest.raises(OSError, match=expected):
        push(model_folder, hub)
    assert list(files(hub)) == [".gitattributes"]
    assert content_of(model_folder) == before


def test_a_hub_that_cannot_be_reached_is_named(edit_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"{endpoint} cannot be reached"):
            push_to_hub(edit_folder, "me/edited", token=TOKEN, endpoint=endpoint)


def test_offline_mode_is_said_to_be_on(edit_folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        push(edit_folder, hub)
    assert not hub.requests


@pytest.mark.parametrize("name", ["", "a/b/c", "me/ed ited", "me/edited.git", "-me/edited", "me/" + "x" * 97])
def test_a_name_that_the_hub_does_not_take_is_refused_before_anything_is_asked(
    edit_folder: Path, hub: Hub, name: str
) -> None:
    with pytest.raises(ValueError, match=r"cannot be the name of a repository.*owner/name"):
        push(edit_folder, hub, name)
    assert not hub.requests


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "README.md"])
def test_a_folder_that_is_no_whole_export_is_refused_before_anything_is_asked(
    model_folder: Path, hub: Hub, tmp_path: Path, missing: str
) -> None:
    for name, content in content_of(model_folder).items():
        if name != missing:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(FileNotFoundError, match=r"export_hf"):
        push(tmp_path, hub)
    with pytest.raises(FileNotFoundError, match="no folder at"):
        push(tmp_path / "nowhere", hub)
    assert not hub.requests


# --- loading


def test_an_edit_arrives_and_is_loaded_by_its_name(
    edit_folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    push(edit_folder, hub)
    files(hub)["model.safetensors"] = bytes(1000)
    hub.requests.clear()
    (settings, wanted), provenance = load_edit(edit_folder).to_parts(), load_edit(edit_folder).provenance
    for load in (load_edit, Edit.from_pretrained, ProjectionEdit.from_pretrained):
        edit = load("me/edited", token=READER)
        assert edit.to_parts()[0] == settings
        assert wanted.keys() == edit.to_parts()[1].keys()
        assert all(torch.equal(wanted[name], tensor) for name, tensor in edit.to_parts()[1].items())
        assert edit.provenance == provenance
    assert {request.split("/")[-1] for request in hub.requests} == {"edit_config.json", "edit.safetensors"}
    assert sum(request.startswith("GET") for request in hub.requests) == 2  # it is in the cache from then on
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_edit("me/edited") == edit
    with pytest.raises(TypeError, match="holds a ProjectionEdit, and not a SteeringEdit; load it with load_edit"):
        SteeringEdit.from_pretrained("me/edited")


def test_an_edit_on_the_hub_attaches_to_a_plain_model(model_folder: Path, edit_folder: Path, hub: Hub) -> None:
    from transformers import AutoModelForCausalLM

    push(edit_folder, hub, private=False)
    model, tokens = AutoModelForCausalLM.from_pretrained(model_folder).eval(), torch.arange(3, 12)[None]
    with torch.no_grad():
        with attach(model, load_edit(edit_folder)):
            wanted = model(tokens).logits
        with attach(model, "me/edited"):
            assert torch.equal(model(tokens).logits, wanted)


def test_a_revision_is_of_the_hub_and_a_local_folder_is_never_looked_for_there(
    edit_folder: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(edit_folder, hub, revision="rank-8/first")
    assert load_edit("me/edited", revision="rank-8/first", token=TOKEN) == projection(1)
    with pytest.raises(FileNotFoundError, match=r"'me/edited' is neither a local folder nor an edit .* \(404"):
        load_edit("me/edited", token=TOKEN)  # nothing on main
    hub.requests.clear()
    projection(2).save_pretrained(tmp_path / "me" / "edited")
    monkeypatch.chdir(tmp_path)
    assert load_edit("me/edited") == projection(2)
    for name in ("me/edited", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"revision='main' is of the Hub, and .* leave it out"):
            load_edit(name, revision="main")
    for name in ("a/b/c", "./me/else", "nowhere", "/no/where", Path("me/else")):
        with pytest.raises(FileNotFoundError, match=r"holds no edit_config\.json"):
            load_edit(name)
    assert not hub.requests


@pytest.mark.parametrize(("name", "token"), [("me/edited", None), ("me/edited", STRANGER), ("me/nothing", TOKEN)])
def test_what_is_not_to_be_had_is_said_in_one_line(edit_folder: Path, hub: Hub, name: str, token: str | None) -> None:
    push(edit_folder, hub)
    with pytest.raises(FileNotFoundError, match=r"neither a local folder nor an edit .*with token=\.\.\.") as caught:
        load_edit(name, token=token)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_hub_that_is_away_or_offline_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"neither a local folder nor an edit .*offline mode"):
        load_edit("me/edited")
    assert not hub.requests


def test_files_on_the_hub_are_checked_as_those_of_a_folder_and_large_ones_not_fetched(
    edit_folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(edit_folder, hub, private=False)
    monkeypatch.setattr("mrp_lens.edits.serialization.CONFIG_BYTES", 100)
    with pytest.raises(
        ValueError, match=r"edit_config\.json of me/edited has .* no edit's configuration more than 100"
    ):
        load_edit("me/edited")
    assert not any(request.startswith("GET") and "resolve" in request for request in hub.requests)
    monkeypatch.setattr("mrp_lens.edits.serialization.CONFIG_BYTES", 10**6)
    files(hub)["edit.safetensors"] = files(hub)["edit.safetensors"][:-4] + bytes(4)
    with pytest.raises(ValueError, match=r"edit\.safetensors is truncated or was altered"):
        load_edit("me/edited")
    del files(hub)["edit.safetensors"]
    hub.repositories["me/edited"].messages.append("another commit")
    with pytest.raises(FileNotFoundError, match=r"'me/edited' is neither a local folder nor an edit"):
        load_edit("me/edited")
