"""Models on Hugging Face's Hub, by a small server of its own interface on 127.0.0.1."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard, constants

from t2v import TextToVideo
from t2v.errors import UserError
from t2v.generation.card import training_record

COMMIT = "0123456789" * 4


class Hub(BaseHTTPRequestHandler):
    """One repository, someone/model, with one commit; the files are in `server.files`."""

    def log_message(self, *_):
        pass

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        files = self.server.files
        path = self.path.partition("?")[0]
        if "someone/model" not in path:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif "revision/v9" in path:
            self.answer({"error": "Invalid rev id: v9"}, 404, X_Error_Code="RevisionNotFound")
        elif "/resolve/" in path:
            content = files.get(path.split("/", 5)[5])
            if content is None:
                self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            else:
                self.server.downloads.append(path.split("/", 5)[5])
                self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)
        elif "/tree/" in path:
            self.answer(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
            )
        else:
            self.server.revisions.append(path.rpartition("/")[2])
            self.answer({"id": "someone/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self.answer({"url": f"{constants.ENDPOINT}/someone/model"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer(
                {
                    "files": [
                        {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                        for each in files
                    ]
                }
            )
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{constants.ENDPOINT}/someone/model/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer({"errors": [], "warnings": []})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.downloads, server.revisions = {}, [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    # What HF_ENDPOINT, HF_HUB_OFFLINE and HF_HUB_CACHE set before the package is imported.
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_nothing")
    yield server
    server.shutdown()
    server.server_close()


def test_a_pushed_model_is_loaded_by_its_name(model, hub):
    model.prompts, model.training = ["a red `circle`"], {"training data": "runs/demo/tokens", "test/fvd": 12.5}
    assert COMMIT in model.push_to_hub("someone/model")
    card = ModelCard(hub.files["README.md"].decode())
    assert 'from_pretrained("someone/model")' in card.text
    hub.files["README.md"], hub.files["code.py"] = b"The user's card", b"raise SystemExit"
    model.push_to_hub("someone/model")
    assert hub.files["README.md"] == b"The user's card"
    hub.downloads.clear()
    loaded = TextToVideo.from_pretrained("someone/model", revision="v1", device="cpu")
    assert hub.revisions[-1] == "v1"
    assert (loaded.prompts, loaded.training) == (model.prompts, model.training)
    assert torch.equal(loaded.generate("red", 3), model.generate("red", 3))
    assert not {"code.py", "README.md"} & set(hub.downloads)


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("someone/nothing", None, "no such folder, and http://127.0.0.1:.* no repository of this name"),
        ("someone/model", "v9", "of this name with the revision v9"),
        ("someone/model", None, "'someone/model' is not an exported model, it has no text_to_video.json"),
        ("model", None, "'model' is not an exported model, it has no"),
        ("model", "v1", "revision=v1 is of a repository of the Hub"),
    ],
)
def test_a_repository_that_cannot_be_loaded_is_one_sentence(hub, name, revision, message):
    hub.files["notes.txt"] = b"no model"
    with pytest.raises(UserError, match=message):
        TextToVideo.from_pretrained(name, revision=revision)


def test_without_a_network_there_is_one_sentence(model, hub, monkeypatch):
    hub.shutdown()
    hub.server_close()
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(UserError, match=r"'someone/model' is not an exported model: .* check the name, the net"):
            TextToVideo.from_pretrained("someone/model")
        with pytest.raises(UserError, match="'someone/model' cannot be uploaded to http"):
            model.push_to_hub("someone/model")


def test_the_folder_has_a_card_with_metadata(model, tmp_path):
    model.prompts = ["a red circle: it's\nround", "zwei blaue Kreise"]
    model.training = {"optimizer steps": 2300, "test/fvd": 12.5}
    model.save_pretrained(tmp_path / "model")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("t2v", "text-to-video")
    assert [each["text"] for each in card.data.widget] == ["a red circle: it's round", "zwei blaue Kreise"]
    assert card.data.license is None
    for line in ("| optimizer steps | 2,300 |", "| test/fvd | 12.5 |", "    zwei blaue Kreise", "| length | 5 frames"):
        assert line in card.text
    assert TextToVideo.from_pretrained(tmp_path / "model").prompts == model.prompts


def test_the_record_has_the_figures_of_this_step_only(tmp_path):
    path = tmp_path / "run/checkpoints/last.ckpt"
    path.parent.mkdir(parents=True)
    checkpoint = SimpleNamespace(
        global_step=7, fingerprint={"fps": 8.0}, datamodule_hyper_parameters={"train": ["/home/me/a/b/c", "s3://x/y"]}
    ).__dict__
    report = {"metrics": {"test/fvd": 3.5, "test/none": None}, "protocol": {"step": 7, "model": {"fps": 8.0}}}
    (tmp_path / "run/test.json").write_text(json.dumps(report))
    record = training_record(checkpoint, path)
    assert record == {"training data": "a/b/c, x/y", "optimizer steps": 7, "test/fvd": 3.5}
    assert "test/fvd" not in training_record({**checkpoint, "global_step": 8}, path)
    (tmp_path / "run/test.json").write_text("[]")
    assert "test/fvd" not in training_record(checkpoint, path)
