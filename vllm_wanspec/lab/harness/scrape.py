"""Reading the project's Prometheus metrics while something is being measured."""

from __future__ import annotations

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from vllm_wanspec.lab.harness.client import ClientError

PREFIX = "wanspec_"
TIMEOUT_S = 5.0

#: Name, labels and value of one sample.
Sample = tuple[str, dict[str, str], float]


async def read_samples(http: aiohttp.ClientSession, url: str, prefix: str = PREFIX) -> list[Sample]:
    """Return the samples that an endpoint serves under the project's names, or under others.

    The rest are not even parsed: a vLLM server has hundreds, and reading them would disturb the next measurement.

    Raises:
        ClientError: The metrics cannot be read.
    """
    try:
        async with http.get(url, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as response:
            response.raise_for_status()
            lines = (await response.text()).splitlines(keepends=True)
        ours = "".join(line for line in lines if line.startswith(prefix))
        families = list(text_string_to_metric_families(ours))
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise ClientError(f"{url}: cannot read metrics: {error or type(error).__name__}") from error
    return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]


async def link_is_up(http: aiohttp.ClientSession, url: str, drafter: str) -> bool:
    """Whether the target behind a metrics endpoint has been welcomed by a drafter."""
    try:
        samples = await read_samples(http, url)
    except ClientError:
        return False
    return any(
        name == "wanspec_drafter_up" and labels.get("drafter") == drafter and value == 1.0
        for name, labels, value in samples
    )
