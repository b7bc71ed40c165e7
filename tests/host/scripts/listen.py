"""Queues the prompt on stdin, and prints the messages that the host sends about it over its websocket.

Run by the host's interpreter. Arguments: the host's URL, and the step after which to interrupt the run (0: never).
"""

import asyncio
import json
import sys

import aiohttp

ENDS = {"execution_success", "execution_error", "execution_interrupted"}


async def listen(url: str, interrupt_at: int, prompt: object) -> list[tuple[str, dict[str, object]]]:
    heard = []
    async with aiohttp.ClientSession(url) as session, session.ws_connect("/ws?clientId=listener") as socket:
        await session.post("/prompt", json={"prompt": prompt, "client_id": "listener"})
        async for message in socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            heard.append((event["type"], event["data"]))
            if event["type"] == "progress" and 0 < interrupt_at <= event["data"]["value"]:
                await session.post("/interrupt")
            if event["type"] in ENDS:
                return heard
    raise RuntimeError("the host closed the connection")


if __name__ == "__main__":
    json.dump(asyncio.run(listen(sys.argv[1], int(sys.argv[2]), json.load(sys.stdin))), sys.stdout)
