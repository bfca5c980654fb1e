"""The courier that calls the sites in this process keeps the contract of all couriers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ffm_secure.engines.in_process import InProcessCourier
from ffm_secure.transport.courier import MachineCourier
from tests.engines.courier_contract import ALL, CourierContract, CourierLossContract, EchoSite


class InProcessFederation:
    notice = 1.0
    rejoin = 1.0

    def __init__(self) -> None:
        self.sites = {site: EchoSite() for site in ALL}
        self.courier: InProcessCourier = self._open()

    def _open(self) -> InProcessCourier:
        return InProcessCourier({site: echo.handle for site, echo in self.sites.items()})

    def kill(self, site: int) -> None:
        self.courier.leave(site)

    def revive(self, site: int) -> None:
        self.courier.join(site, self.sites[site].handle)

    def restart(self) -> None:
        self.courier.close()
        self.courier = self._open()


@pytest.fixture
def federation() -> Iterator[InProcessFederation]:
    federation = InProcessFederation()
    yield federation
    federation.courier.close()


class TestInProcess(CourierContract, CourierLossContract):
    pass


def test_it_is_a_courier(federation: InProcessFederation) -> None:
    courier: MachineCourier = federation.courier
    assert courier.seconds_at_sites() == 0.0
