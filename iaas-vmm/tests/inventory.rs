//! The reference inventory against the suite of its contract, on this machine.

#![allow(clippy::unwrap_used, reason = "a test says what it expects by panicking")]

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::spi::Ctx;
use iaas_core::spi::Stamp;
use iaas_core::spi::host::HostInventory;
use iaas_core::testing::conformance::inventory;
use iaas_core::testing::conformance::rig::Rig;
use iaas_core::testing::conformance::rig::Wrapped;
use iaas_core::testing::conformance::wire::Wire;
use iaas_vmm::MachineInventory;
use nix::time::ClockId;
use uuid::Uuid;

struct Machine(Mutex<Option<tempfile::TempDir>>);

impl Machine {
    fn open(&self) -> Result<Arc<dyn HostInventory>> {
        let state = self.0.lock().unwrap().as_ref().unwrap().path().to_owned();
        let (cloud, host) = (Id::from_uuid(Uuid::from_u128(0xa)), Id::from_uuid(Uuid::from_u128(4)));
        Ok(Arc::new(MachineInventory::open(&state, cloud, host)?))
    }
}

#[async_trait]
impl Rig for Machine {
    type Provider = dyn HostInventory;

    async fn fresh(&self) -> Result<Arc<dyn HostInventory>> {
        *self.0.lock().unwrap() = Some(tempfile::tempdir().unwrap());
        self.open()
    }

    async fn reopen(&self, old: Arc<dyn HostInventory>) -> Result<Arc<dyn HostInventory>> {
        drop(old);
        self.open()
    }

    async fn change(&self, provider: &dyn HostInventory, cx: &Ctx) -> Result<()> {
        provider.lease(cx, Duration::from_secs(1)).await.map(drop)
    }
}

#[async_trait]
impl inventory::InventoryRig for Machine {
    async fn stamp(&self) -> Result<Stamp> {
        let now = Duration::from(nix::time::clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap());
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        Ok(Stamp {
            wall: jiff::Timestamp::now(),
            boot_id: Uuid::parse_str(boot.trim()).unwrap(),
            mono_ns: u64::try_from(now.as_nanos()).unwrap(),
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_inventory_of_this_machine_keeps_its_contract() {
    inventory::run(&Machine(Mutex::default())).await.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_inventory_of_this_machine_keeps_its_contract_over_a_wire() {
    inventory::run(&Wrapped::new(Machine(Mutex::default()), Wire)).await.assert_clean();
}

// A management controller is an option of a host, and this one has none.
// surface: Power::is_on excused by HostProviders::power
// surface: Power::set excused by HostProviders::power
//
// Who has no key to seal to gets nothing sealed: a key manager has nobody to work for.
// surface: KeyManager::generate excused by Hello::seal_to
// surface: KeyManager::rewrap excused by Hello::seal_to
// surface: KeyManager::seal excused by Hello::seal_to
#[tokio::test(flavor = "multi_thread")]
async fn this_machine_opens_no_secrets_and_says_so() {
    let machine = Machine(Mutex::default());
    let hello = machine.fresh().await.unwrap().hello().await.unwrap();
    assert_eq!(hello.seal_to, None);
}
