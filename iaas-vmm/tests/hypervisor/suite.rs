//! The reference hypervisor against the suite of its contract, with real guests.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use iaas_core::Digest;
use iaas_core::Entity;
use iaas_core::Id;
use iaas_core::ObjectRef;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::spi::Ctx;
use iaas_core::spi::hypervisor::Device;
use iaas_core::spi::hypervisor::Hypervisor;
use iaas_core::spi::hypervisor::Origin;
use iaas_core::spi::hypervisor::Vm;
use iaas_core::spi::hypervisor::VmSpec;
use iaas_core::testing::conformance::Report;
use iaas_core::testing::conformance::hypervisor;
use iaas_core::testing::conformance::hypervisor::HypervisorRig;
use iaas_core::testing::conformance::rig::ConvergeRig;
use iaas_core::testing::conformance::rig::Rig;
use iaas_core::testing::conformance::rig::Wrapped;
use iaas_core::testing::conformance::wire::Wire;
use iaas_vmm::HostHypervisor;
use uuid::Uuid;

use super::rig;

pub(crate) async fn run() -> Report {
    hypervisor::run(&Hosts::new().await).await
}

pub(crate) async fn run_over_a_wire() -> Report {
    hypervisor::run(&Wrapped::new(Hosts::new().await, Wire)).await
}

struct Hosts {
    donor: rig::Rig,
    newest: Mutex<Option<(tempfile::TempDir, HostHypervisor<super::Vmm>)>>,
}

impl Hosts {
    async fn new() -> Self {
        // Its artifacts are lent to each fresh host.
        Self { donor: rig::Rig::new().await, newest: Mutex::default() }
    }

    fn dir(&self) -> PathBuf {
        self.newest.lock().unwrap().as_ref().unwrap().0.path().to_owned()
    }

    fn provider(&self) -> HostHypervisor<super::Vmm> {
        self.newest.lock().unwrap().as_ref().unwrap().1.clone()
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        if let Some((dir, _)) = self.newest.lock().unwrap().take() {
            rig::end_all(dir.path());
        }
    }
}

#[async_trait]
impl Rig for Hosts {
    type Provider = dyn Hypervisor;

    async fn fresh(&self) -> Result<Arc<dyn Hypervisor>> {
        if let Some((old, _)) = self.newest.lock().unwrap().take() {
            rig::end_all(old.path());
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("state")).unwrap();
        let lent = self.donor.dir.path().join("state/artifacts");
        std::os::unix::fs::symlink(lent, dir.path().join("state/artifacts")).unwrap();
        std::fs::File::create(dir.path().join("volume")).unwrap().set_len(8 << 20).unwrap();
        let hypervisor = rig::try_open(dir.path())?;
        *self.newest.lock().unwrap() = Some((dir, hypervisor.clone()));
        Ok(Arc::new(hypervisor))
    }

    async fn reopen(&self, old: Arc<dyn Hypervisor>) -> Result<Arc<dyn Hypervisor>> {
        drop(old);
        let fresh = rig::try_open(&self.dir())?;
        if let Some((_, hypervisor)) = self.newest.lock().unwrap().as_mut() {
            *hypervisor = fresh.clone();
        }
        Ok(Arc::new(fresh))
    }

    async fn change(&self, provider: &dyn Hypervisor, cx: &Ctx) -> Result<()> {
        let mut spec = self.spec(1);
        spec.run = iaas_core::spi::hypervisor::Run::Off { grace: Duration::ZERO };
        provider.ensure(cx, Id::from_uuid(Uuid::from_u128(99)), Rev(1), &spec).await.map(drop)
    }

    async fn world(&self) -> Result<Option<Vec<ObjectRef>>> {
        let mut names = rig::names(&self.dir().join("state/vms"));
        names.extend(rig::names(&self.dir().join("state/roles/runner")));
        names.sort_unstable();
        names.dedup();
        let ids = names.iter().filter_map(|name| Uuid::try_parse(name).ok());
        Ok(Some(ids.map(|id| ObjectRef { kind: Vm::NAME.to_owned(), id }).collect()))
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(120)
    }
}

#[async_trait]
impl ConvergeRig<Vm> for Hosts {
    fn spec(&self, _number: u32) -> VmSpec {
        let mut spec = self.donor.spec(rig::on(1));
        spec.memory = 128 << 20;
        spec
    }

    fn bad(&self) -> Vec<VmSpec> {
        let good = self.spec(1);
        let origin =
            |cmdline: &str, kernel: Digest| Origin::Kernel { kernel, initrd: None, cmdline: cmdline.into() };
        vec![
            VmSpec { vcpus: 0, ..good.clone() },
            VmSpec { vcpus: 257, ..good.clone() },
            VmSpec { memory: 1000, ..good.clone() },
            VmSpec { memory: 0, ..good.clone() },
            VmSpec { passport: vec![0; 20 << 10].into(), ..good.clone() },
            VmSpec { origin: origin("a\nb", self.donor.kernel), ..good.clone() },
            // An initrd is no kernel.
            VmSpec { origin: origin("", self.donor.initrd), ..good },
        ]
    }

    async fn plant(&self, id: Id<Vm>) -> Result<bool> {
        let folder = self.dir().join("state/vms").join(id.to_string());
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("console"), "whose?").unwrap();
        Ok(true)
    }
}

#[async_trait]
impl HypervisorRig for Hosts {
    async fn guest_ignores_button(&self, _vm: Id<Vm>) -> bool {
        // It has only just been started: nobody in it listens to a button yet.
        true
    }

    async fn kill(&self, vm: Id<Vm>) -> bool {
        let runner = self.provider().runner(vm).await.unwrap().unwrap();
        let Some(vmm) = super::vmm_of(runner.pid()) else { return false };
        super::both::kill(vmm);
        true
    }

    async fn device(&self) -> Option<Device> {
        Some(rig::disk(5, &self.dir().join("volume")).1)
    }
}
