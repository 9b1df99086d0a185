"""NATS goes away and comes back; the router stays, says so, and goes on."""

import asyncio

import pytest

pytestmark = pytest.mark.nats

CHAT = "/v1/chat/completions"


@pytest.fixture
async def server(own_broker):
    return await own_broker()


@pytest.fixture
async def own_broker(tmp_path, make_identities):
    from shared.broker import NatsServer

    servers = []

    async def start(port=0):
        server = NatsServer(identities=make_identities(), data_dir=tmp_path / "nats", port=port)
        await server.__aenter__()
        servers.append(server)
        return server

    yield start
    for server in servers:
        await server.__aexit__(None, None, None)


async def test_requests_fail_at_once_and_work_again_after(
    server, own_broker, start_router, start_worker, http, chat, eventually
):
    router = await start_router(server=server)
    worker = await start_worker(server=server)
    assert (await http.post(f"{router.url}{CHAT}", json=chat())).status_code == 200

    await server.__aexit__(None, None, None)
    await eventually(lambda: not router.dispatcher.bus.connected)
    refused = await http.post(f"{router.url}{CHAT}", json=chat())
    live = await http.get(f"{router.url}/livez")
    ready = await http.get(f"{router.url}/readyz")

    assert refused.status_code == 503
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert "NATS" in refused.json()["error"]["message"]
    assert (live.status_code, ready.status_code) == (200, 503)
    # A 0 would have whoever scales by it take all workers away.
    assert "mesh_wanted_workers" not in (await http.get(f"{router.url}/metrics")).text

    await own_broker(port=server.port)
    await eventually(lambda: router.dispatcher.bus.connected and worker.bus.connected)
    await worker.bus.barrier()
    assert not router.dispatcher.informed
    assert (await http.post(f"{router.url}{CHAT}", json=chat())).status_code == 200
    await eventually(lambda: router.dispatcher.informed and router.dispatcher.board.informed)
    assert (await http.get(f"{router.url}/readyz")).status_code == 200
    assert "mesh_wanted_workers" in (await http.get(f"{router.url}/metrics")).text


async def test_open_answers_end_when_nats_stays_away(
    server, start_router, start_worker, http, chat
):
    router = await start_router(server=server, nats_patience=1.0)

    async def script(job):
        await job.accept()
        if job.prompt == "begun":
            await job.send(job.delta("Hel"))

    worker = await start_worker(script, server=server)
    waiting = asyncio.create_task(http.post(f"{router.url}{CHAT}", json=chat("waits")))
    begun = asyncio.create_task(http.post(f"{router.url}{CHAT}", json=chat("begun", stream=True)))
    await worker.job(1)

    await server.__aexit__(None, None, None)

    assert (await waiting).status_code == 503
    assert '"error"' in (await begun).text


# 3 s are more than the time after which a worker whose beats are not heard counts as lost.
AWAY = pytest.mark.parametrize("away", [0.0, 3.0])


@AWAY
async def test_what_had_not_begun_is_asked_again_after_an_absence(
    server, own_broker, start_router, start_worker, http, chat, away
):
    router = await start_router(server=server)
    restarted = asyncio.Event()

    async def script(job):
        await job.accept()
        if restarted.is_set():
            await job.speak("after all")

    worker = await start_worker(script, server=server)
    asked = asyncio.create_task(http.post(f"{router.url}{CHAT}", json=chat()))
    await worker.job()

    await server.__aexit__(None, None, None)
    restarted.set()
    await asyncio.sleep(away)
    await own_broker(port=server.port)
    answer = await asked

    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "after all"


@AWAY
@pytest.mark.parametrize("resumes", [0, 3])
async def test_a_stream_that_lost_its_end_in_a_restart_goes_on_or_ends(
    server, own_broker, start_router, start_worker, http, chat, monkeypatch, resumes, away
):
    monkeypatch.setattr("router.call.SUSPICION", 0.5)
    router = await start_router(server=server, resumes=resumes)

    async def script(job):
        await job.accept()
        if job.request.resume:
            await job.send(job.delta("lo"), job.done(), job.end())
        else:
            await job.send(job.delta("Hel"))

    await start_worker(script, server=server)
    async with http.stream("POST", f"{router.url}{CHAT}", json=chat(stream=True)) as answer:
        lines = answer.aiter_lines()
        async for line in lines:
            if "Hel" in line:
                break
        await server.__aexit__(None, None, None)
        await asyncio.sleep(away)
        await own_broker(port=server.port)
        rest = "".join([line async for line in lines])

    if resumes:
        assert '"error"' not in rest
        assert '"lo"' in rest
        assert "[DONE]" in rest
    else:
        assert '"error"' in rest
        assert "[DONE]" not in rest
