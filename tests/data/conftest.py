import time

import huggingface_hub.constants
import pytest
from fake_hub import FakeHub


@pytest.fixture
def hub(monkeypatch):
    """A repository on loopback; the client retries without pauses."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # Telemetry would contact the public hub.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    yield server
    server.close()
