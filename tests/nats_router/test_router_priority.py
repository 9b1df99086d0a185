"""Priority and owner on their way to the worker."""

import pytest

pytestmark = pytest.mark.nats


@pytest.mark.parametrize(
    ("fields", "priority"),
    [
        ({}, "interactive"),
        ({"priority": None, "service_tier": None}, "interactive"),
        ({"priority": "batch"}, "batch"),
        ({"service_tier": "flex"}, "batch"),
        ({"service_tier": "auto"}, "interactive"),
        ({"priority": "interactive", "service_tier": "flex"}, "interactive"),
    ],
)
async def test_the_worker_is_told_the_priority(
    router, http, start_worker, unique, fields, priority
):
    worker = await start_worker()
    bodies = {
        "chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
        "completions": {"prompt": "hi"},
        "embeddings": {"input": "hi"},
    }
    for path, body in bodies.items():
        answer = await http.post(f"{router.url}/v1/{path}", json={"model": unique} | body | fields)
        assert answer.status_code == 200

    assert [job.request.priority for job in worker.jobs] == [priority] * 3


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("priority", "urgent", "'interactive', 'batch'"),
        ("priority", 3, "'interactive', 'batch'"),
        ("service_tier", 3, "a string"),
    ],
)
async def test_a_wrong_priority_is_400(router, http, chat, field, value, words):
    answer = await http.post(f"{router.url}/v1/chat/completions", json=chat(**{field: value}))

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert words in answer.json()["error"]["message"]


async def test_embeddings_have_an_owner_as_chats_have(router, http, start_worker, chat, unique):
    worker = await start_worker()
    headers = {"authorization": "Bearer secret"}

    await http.post(f"{router.url}/v1/chat/completions", json=chat(), headers=headers)
    await http.post(
        f"{router.url}/v1/embeddings", json={"model": unique, "input": "a"}, headers=headers
    )
    await http.post(f"{router.url}/v1/embeddings", json={"model": unique, "input": "a"})

    owners = [job.request.owner for job in worker.jobs]
    assert owners[0] == owners[1] != ""
    assert owners[2] == ""
