"""A small tier of the campaigns on hostile input and networks; `make campaigns` runs them at full size."""

import pytest

from reliability import fuzz, hostile, network
from reliability.campaign import Campaign

SCALES = {"bodies": 0.003, "maker-api": 0.005, "command-lines": 0.02, "page-xss": 0.02, "cut-service-answers": 0.002}
needs_fuzz = pytest.mark.skipif(not fuzz.is_installed(), reason="needs .venvs/fuzz: make .venvs/fuzz/installed")
needs_browser = pytest.mark.skipif(
    hostile.browser_path() is None, reason="needs Chromium and its driver: apt-get install chromium chromium-driver"
)
needs_servers = pytest.mark.skipif(not network.servers_installed(), reason="needs queue servers: make servers")
NEEDS = {
    "bodies": [needs_fuzz],
    "maker-api": [needs_fuzz],
    "page-xss": [needs_browser],
    "cut-service-answers": [needs_servers],
}


@pytest.mark.filterwarnings("ignore:Support for InfluxDB")  # openstacksdk 4.22 warns of it at every clouds.yaml
@pytest.mark.parametrize(
    "campaign",
    [
        pytest.param(campaign, id=campaign.name, marks=NEEDS.get(campaign.name, []))
        for module in (fuzz, network, hostile)
        for campaign in module.CAMPAIGNS
    ],
)
def test_nothing_is_broken_by(campaign: Campaign) -> None:
    result = campaign.run(SCALES.get(campaign.name, 0.01))
    assert result.violations == []
    assert int(result.figures["n"]) > 0
