//! Any sequence of requests converges, whatever goes wrong meanwhile.
//!
//! A case is a list of steps: requests through a session, faults of the store and of the providers, deaths of the control
//! plane, guests that crash, and time that passes. A shadow notes what the answers promised: a request whose answer was
//! lost is sent again with its token until it is answered. In the end nothing goes wrong any more, everything comes to
//! rest, and the store, the world and the shadow must say the same; also after a restart. Then everything is deleted, and
//! nothing must be left.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may")]

mod common;

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::future::IntoFuture;
use std::sync::Arc;
use std::time::Duration;

use common::Rig;
use common::Tenant;
use common::faulty_store::CommitFault;
use common::faulty_store::FaultyStore;
use common::faulty_store::Plan;
use common::judge::judge;
use common::tenant;
use common::virtual_clock::VirtualClock;
use common::virtual_clock::in_virtual_time;
use iaas_core::ByteSize;
use iaas_core::Cloud;
use iaas_core::Error;
use iaas_core::ErrorKind;
use iaas_core::Id;
use iaas_core::Labels;
use iaas_core::ObjectRef;
use iaas_core::Outcome;
use iaas_core::Rev;
use iaas_core::cloud::Change;
use iaas_core::cloud::Session;
use iaas_core::engine::adopt;
use iaas_core::engine::intent::Intent;
use iaas_core::engine::state::State;
use iaas_core::model::*;
use iaas_core::security::actions::Nic;
use iaas_core::spi::block::PoolVolume;
use iaas_core::spi::hypervisor::DeviceState;
use iaas_core::spi::hypervisor::Vm;
use iaas_core::spi::state_store::StateStore;
use iaas_core::store::MemoryStore;
use iaas_core::testing::fake::FakeHypervisor;
use iaas_core::testing::fake::Fault;
use iaas_core::testing::fake::Landed;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

/// One of the few things of a type that a case is about.
type Slot = u8;

/// What happens next.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// A request, sent until it is answered; then perhaps once more.
    Ask(Ask, Guard, Again),
    /// Everything may come to rest.
    Rest,
    /// Time passes.
    Pass { seconds: u16 },
    /// Effects go wrong from the one after next `after` on.
    Effects { after: u8, count: u8, fault: Fault },
    /// A commit goes wrong.
    Commit { after: u8, fault: CommitFault },
    /// The control plane dies and starts again.
    Restart,
    /// The VMM of an instance crashes.
    Crash(Slot),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guard {
    None,
    Version,
    StaleVersion,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Again {
    No,
    Yes,
}

/// A request about slots.
#[derive(Clone, Copy, Debug)]
enum Ask {
    Launch { web: Slot, disk: Option<Slot>, nic: bool },
    Start(Slot),
    Stop { web: Slot, grace: u8 },
    Reboot(Slot),
    DeleteInstance(Slot),
    LabelInstance(Slot, u8),
    Volume(Slot),
    LabelVolume(Slot, u8),
    DeleteVolume(Slot),
    Attach { web: Slot, what: Device },
    Detach { web: Slot, what: Device },
    Network(Slot),
    DeleteNetwork(Slot),
    Subnet(Slot),
    DeleteSubnet(Slot),
    Port { port: Slot, subnet: Option<Slot> },
    DeletePort(Slot),
    Group(Slot),
    DeleteGroup(Slot),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Device {
    Disk(Slot),
    Nic(Slot),
}

/// What the answers so far promise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Shadow {
    /// By noun and name: the id, and the label.
    things: BTreeMap<(&'static str, String), (uuid::Uuid, Option<u8>)>,
    power: BTreeMap<Slot, Power>,
    attached: BTreeSet<(Slot, Device)>,
}

impl Shadow {
    fn has(&mut self, noun: &'static str, name: String, id: uuid::Uuid) {
        self.things.insert((noun, name), (id, None));
    }

    fn labelled(&mut self, noun: &'static str, name: String, label: u8) {
        if let Some(thing) = self.things.get_mut(&(noun, name)) {
            thing.1 = Some(label);
        }
    }

    fn gone(&mut self, noun: &'static str, name: String) {
        self.things.remove(&(noun, name));
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn whatever_goes_wrong_it_converges_to_what_was_promised(
        settle in prop_oneof![Just(0u64), Just(40), Just(1500)],
        delay in prop_oneof![3 => Just(0u64), 1 => Just(30)],
        steps in proptest::collection::vec(step(), 1..24),
    ) {
        let defects = run(settle, delay, &steps);
        prop_assert!(defects.is_empty(), "{}", defects.join("\n"));
    }
}

/// Found failures are kept beside this file and are tried first.
fn config() -> ProptestConfig {
    let kept = FileFailurePersistence::Direct(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/engine_random.regressions"
    ));
    let config = ProptestConfig::with_cases(CASES);
    ProptestConfig { max_shrink_iters: 1000, failure_persistence: Some(Box::new(kept)), ..config }
}

fn step() -> impl Strategy<Value = Step> {
    let faults = [
        Fault::Refused,
        Fault::NotLanded,
        Fault::ReplyLost,
        Fault::Half,
        Fault::CrashBefore,
        Fault::CrashAfter,
    ];
    let effects = (0u8..6, 1u8..5, proptest::sample::select(faults.to_vec()))
        .prop_map(|(after, count, fault)| Step::Effects { after, count, fault });
    let commit = (0u8..5, proptest::sample::select(CommitFault::ALL.to_vec()))
        .prop_map(|(after, fault)| Step::Commit { after, fault });
    let guard =
        prop_oneof![6 => Just(Guard::None), 1 => Just(Guard::Version), 1 => Just(Guard::StaleVersion)];
    let again = prop_oneof![3 => Just(Again::No), 1 => Just(Again::Yes)];
    prop_oneof![
        16 => (ask(), guard, again).prop_map(|(ask, guard, again)| Step::Ask(ask, guard, again)),
        4 => Just(Step::Rest),
        1 => (1u16..120).prop_map(|seconds| Step::Pass { seconds }),
        4 => effects,
        3 => commit,
        1 => Just(Step::Restart),
        1 => web().prop_map(Step::Crash),
    ]
}

fn ask() -> impl Strategy<Value = Ask> {
    let disk = || 0u8..3;
    let few = || 0u8..2;
    let device = || prop_oneof![disk().prop_map(Device::Disk), few().prop_map(Device::Nic)];
    prop_oneof![
        6 => (web(), proptest::option::of(disk()), any::<bool>())
            .prop_map(|(web, disk, nic)| Ask::Launch { web, disk, nic }),
        2 => web().prop_map(Ask::Start),
        3 => (web(), 0u8..3).prop_map(|(web, grace)| Ask::Stop { web, grace }),
        2 => web().prop_map(Ask::Reboot),
        3 => web().prop_map(Ask::DeleteInstance),
        1 => (web(), any::<u8>()).prop_map(|(web, label)| Ask::LabelInstance(web, label)),
        4 => disk().prop_map(Ask::Volume),
        1 => (disk(), any::<u8>()).prop_map(|(disk, label)| Ask::LabelVolume(disk, label)),
        2 => disk().prop_map(Ask::DeleteVolume),
        5 => (web(), device()).prop_map(|(web, what)| Ask::Attach { web, what }),
        4 => (web(), device()).prop_map(|(web, what)| Ask::Detach { web, what }),
        1 => few().prop_map(Ask::Network),
        1 => few().prop_map(Ask::DeleteNetwork),
        1 => few().prop_map(Ask::Subnet),
        1 => few().prop_map(Ask::DeleteSubnet),
        3 => (few(), proptest::option::of(few())).prop_map(|(port, subnet)| Ask::Port { port, subnet }),
        1 => few().prop_map(Ask::DeletePort),
        1 => few().prop_map(Ask::Group),
        1 => few().prop_map(Ask::DeleteGroup),
    ]
}

fn web() -> impl Strategy<Value = Slot> {
    0u8..2
}

#[test]
fn trouble_from_before_a_restart_is_over_when_the_object_works_again() {
    let nic = Ask::Launch { web: 0, disk: None, nic: true };
    let steps = [
        Step::Effects { after: 0, count: 1, fault: Fault::Refused },
        Step::Commit { after: 2, fault: CommitFault::NotLanded },
        Step::Ask(nic, Guard::None, Again::No),
    ];
    assert_eq!(run(0, 0, &steps), [] as [String; 0]);
}

/// Plays a case; each line is a defect.
fn run(settle: u64, delay: u64, steps: &[Step]) -> Vec<String> {
    in_virtual_time(async move {
        let within = Duration::from_secs(24 * 3600);
        let case = async {
            let mut life = Life::begin(Duration::from_millis(settle), Duration::from_millis(delay)).await;
            for (number, step) in steps.iter().enumerate() {
                life.step(number, *step).await;
            }
            life.verdicts().await
        };
        let over = tokio::time::timeout(within, case).await;
        over.unwrap_or_else(|_| vec!["a day has passed and the case is not over".to_owned()])
    })
}

struct Life {
    rig: Rig,
    plan: Arc<Plan>,
    store: Arc<FaultyStore>,
    cloud: Option<Cloud>,
    tenant: Tenant,
    shadow: Shadow,
    defects: Vec<String>,
    orphans: u64,
}

impl Life {
    async fn begin(settle: Duration, delay: Duration) -> Self {
        let clock = Arc::new(VirtualClock::new());
        let mut rig = Rig::on(clock.clone());
        let plan = Plan::new();
        let store = FaultyStore::new(MemoryStore::with_clock(clock), &plan);
        rig.store = Arc::clone(&store) as Arc<dyn StateStore>;
        let cloud = rig.open().await.unwrap();
        let tenant = tenant(&cloud.session_as("root"), &rig, "acme").await.unwrap();
        assert!(cloud.settled(MINUTE).await);
        rig.world.set_settle(settle);
        rig.world.set_delay(delay);
        let (shadow, defects) = Default::default();
        Self { rig, plan, store, cloud: Some(cloud), tenant, shadow, defects, orphans: 0 }
    }

    async fn step(&mut self, number: usize, step: Step) {
        match step {
            Step::Ask(ask, guard, again) => self.ask(number, ask, guard, again).await,
            Step::Rest => self.rest().await,
            Step::Pass { seconds } => {
                tokio::time::sleep(Duration::from_secs(seconds.into())).await;
                self.revive().await;
            }
            Step::Effects { after, count, fault } => {
                let next = self.rig.world.effect_count() + 1 + u64::from(after);
                // Whoever dies does so once; who starts again may find the next fault.
                let count = if matches!(fault, Fault::CrashBefore | Fault::CrashAfter) { 1 } else { count };
                (next..next + u64::from(count)).for_each(|n| self.rig.world.fail_at(n, fault));
            }
            Step::Commit { after, fault } => {
                self.revive().await;
                self.plan.fail_at(self.plan.count() + 1 + u64::from(after), fault);
            }
            Step::Restart => self.restart().await,
            Step::Crash(slot) => {
                let name = web_name(slot);
                if let Some((id, _)) = self.shadow.things.get(&("instance", name)) {
                    FakeHypervisor::open(&self.rig.world, self.rig.host).kill(Id::from_uuid(*id));
                }
            }
        }
    }

    fn root(&self) -> Session {
        self.cloud.as_ref().unwrap().session_as("root")
    }

    /// Everything comes to rest, or dies.
    async fn rest(&mut self) {
        for _ in 0..20 {
            self.revive().await;
            let cloud = self.cloud.clone().unwrap();
            let rests = tokio::select! {
                rests = cloud.settled(30 * MINUTE) => rests,
                () = self.plan.crashed() => false,
                () = self.rig.world.crashed() => false,
            };
            if rests && !self.dead() {
                return;
            }
            if !self.dead() {
                self.defects.push("it does not come to rest".to_owned());
                return;
            }
        }
        self.defects.push("it dies again and again".to_owned());
    }

    fn dead(&self) -> bool {
        self.plan.is_down() || self.rig.world.is_down() || self.plan.lost()
    }

    async fn revive(&mut self) {
        if self.dead() {
            self.restart().await;
        }
    }

    /// The process is gone without a word, and starts again; it may die while it does so.
    async fn restart(&mut self) {
        let cloud = self.cloud.take().unwrap();
        self.orphans += cloud.orphans_removed();
        drop(cloud);
        for _ in 0..10 {
            if self.plan.over() {
                self.plan.forget();
            }
            self.rig.world.restart();
            self.store = self.store.reopen();
            self.rig.store = Arc::clone(&self.store) as Arc<dyn StateStore>;
            let opened = tokio::select! {
                opened = self.rig.open() => opened,
                () = self.plan.crashed() => continue,
                () = self.rig.world.crashed() => continue,
            };
            match opened {
                Ok(cloud) => {
                    self.cloud = Some(cloud);
                    return;
                }
                Err(error) if self.plan.over() || error.outcome() == Outcome::Unknown => continue,
                Err(error) => panic!("it does not open: {error:?}"),
            }
        }
        panic!("it does not open again");
    }

    /// Sends a request until it is answered, and notes what the answer promises.
    async fn ask(&mut self, number: usize, ask: Ask, guard: Guard, again: Again) {
        self.revive().await;
        let token = format!("t{number}");
        let state = self.state().await;
        let Some(request) = self.resolve(&state, ask) else { return };
        let version = match guard {
            Guard::None => None,
            Guard::Version => request.target().and_then(|t| state.brief(&t)).map(|b| b.version),
            Guard::StaleVersion => Some(Rev(1)),
        };
        let answer = self.send(&request, version, &token).await;
        let about = format!("step {number}, {ask:?}");
        let stale = guard == Guard::StaleVersion && !matches!(request, Request::CreateInstance(..));
        if stale && answer.is_ok() && request.target().is_some() {
            self.defects.push(format!("{about}: done at another version"));
        }
        if again == Again::Yes && answer.is_ok() {
            let second = self.send(&request, version, &token).await;
            if second != answer {
                self.defects.push(format!("{about}: answered {answer:?}, then {second:?}"));
            }
        }
        if let Ok(id) = answer {
            self.note(ask, id);
        }
    }

    /// The answer, in the end: what it gave, or why it was refused.
    async fn send(&mut self, request: &Request, version: Option<Rev>, token: &str) -> Answer {
        let mut patience = 2;
        for _ in 0..20 {
            let root = self.root();
            let answer = tokio::select! {
                answer = request.send(&root, version, token) => Some(answer),
                () = self.plan.crashed() => None,
                () = self.rig.world.crashed() => None,
            };
            drop(root);
            match answer {
                Some(Ok(id)) => return Ok(id),
                Some(Err(error)) if REFUSALS.contains(&error.kind()) => return Err(error.kind()),
                Some(Err(error)) if error.outcome() == Outcome::NotDone && patience > 0 => patience -= 1,
                Some(Err(_)) | None => self.restart().await,
            }
        }
        panic!("{request:?} is never answered");
    }

    /// What is stored, read past the store's faults.
    async fn state(&self) -> State {
        adopt::load(&self.store.inner()).await.unwrap()
    }

    /// A request about the things that the slots hold in `state`; `None` if one is missing.
    fn resolve(&self, state: &State, ask: Ask) -> Option<Request> {
        let (root_project, tenant) = (self.tenant.project, self.tenant);
        let owner = Owner::Project(root_project);
        let instance = |slot| state.named::<Instance>(owner, &web_name(slot).parse().unwrap());
        let volume = |slot| state.named::<Volume>(owner, &disk_name(slot).parse().unwrap());
        let network = |slot| state.named::<Network>(owner, &network_name(slot).parse().unwrap());
        let subnet = |slot| state.named::<Subnet>(owner, &subnet_name(slot).parse().unwrap());
        let port = |slot| state.named::<Port>(owner, &port_name(slot).parse().unwrap());
        let group = |slot| state.named::<SecurityGroup>(owner, &group_name(slot).parse().unwrap());
        let label = |label: u8| Labels::new([("n", label.to_string())]).unwrap();
        let what = |device| match device {
            Device::Disk(slot) => {
                volume(slot).map(|volume| Attached::Volume { volume, boot: None, read_only: false })
            }
            Device::Nic(slot) => port(slot).map(Attached::Port),
        };
        Some(match ask {
            Ask::Launch { web, disk, nic } => {
                let volumes = match disk {
                    Some(slot) => vec![volume(slot)?],
                    None => Vec::new(),
                };
                let nics = if nic { vec![tenant.nic()] } else { Vec::new() };
                Request::CreateInstance(web, volumes, nics, tenant)
            }
            Ask::Start(slot) => Request::Start(instance(slot)?),
            Ask::Stop { web, grace } => Request::Stop(instance(web)?, Duration::from_secs(grace.into())),
            Ask::Reboot(slot) => Request::Reboot(instance(slot)?),
            Ask::DeleteInstance(slot) => Request::DeleteInstance(instance(slot)?),
            Ask::LabelInstance(slot, n) => Request::LabelInstance(instance(slot)?, label(n)),
            Ask::Volume(slot) => Request::CreateVolume(root_project, slot),
            Ask::LabelVolume(slot, n) => Request::LabelVolume(volume(slot)?, label(n)),
            Ask::DeleteVolume(slot) => Request::DeleteVolume(volume(slot)?),
            Ask::Attach { web, what: device } => {
                let spec = AttachmentSpec { instance: instance(web)?, what: what(device)? };
                Request::Attach(root_project, attachment_name(web, device), spec)
            }
            Ask::Detach { web, what: device } => {
                let spec = AttachmentSpec { instance: instance(web)?, what: what(device)? };
                Request::Detach(state.attachments.values().find(|a| a.spec == spec)?.meta.id)
            }
            Ask::Network(slot) => Request::CreateNetwork(root_project, slot),
            Ask::DeleteNetwork(slot) => Request::DeleteNetwork(network(slot)?),
            Ask::Subnet(slot) => Request::CreateSubnet(root_project, slot, network(slot)?),
            Ask::DeleteSubnet(slot) => Request::DeleteSubnet(subnet(slot)?),
            Ask::Port { port, subnet: at } => {
                let at = match at {
                    Some(slot) => subnet(slot)?,
                    None => tenant.subnet,
                };
                Request::CreatePort(root_project, port, at)
            }
            Ask::DeletePort(slot) => Request::DeletePort(port(slot)?),
            Ask::Group(slot) => Request::CreateGroup(root_project, slot),
            Ask::DeleteGroup(slot) => Request::DeleteGroup(group(slot)?),
        })
    }

    /// The request was carried out.
    fn note(&mut self, ask: Ask, id: uuid::Uuid) {
        let shadow = &mut self.shadow;
        match ask {
            Ask::Launch { web, disk, .. } => {
                shadow.has("instance", web_name(web), id);
                shadow.power.insert(web, Power::On);
                shadow.attached.extend(disk.map(|disk| (web, Device::Disk(disk))));
            }
            Ask::Start(web) | Ask::Reboot(web) => drop(shadow.power.insert(web, Power::On)),
            Ask::Stop { web, .. } => drop(shadow.power.insert(web, Power::Off)),
            Ask::DeleteInstance(web) => {
                shadow.gone("instance", web_name(web));
                shadow.power.remove(&web);
                shadow.attached.retain(|(of, _)| *of != web);
            }
            Ask::LabelInstance(web, label) => shadow.labelled("instance", web_name(web), label),
            Ask::Volume(disk) => shadow.has("volume", disk_name(disk), id),
            Ask::LabelVolume(disk, label) => shadow.labelled("volume", disk_name(disk), label),
            Ask::DeleteVolume(disk) => shadow.gone("volume", disk_name(disk)),
            Ask::Attach { web, what } => drop(shadow.attached.insert((web, what))),
            Ask::Detach { web, what } => drop(shadow.attached.remove(&(web, what))),
            Ask::Network(slot) => shadow.has("network", network_name(slot), id),
            Ask::DeleteNetwork(slot) => shadow.gone("network", network_name(slot)),
            Ask::Subnet(slot) => shadow.has("subnet", subnet_name(slot), id),
            Ask::DeleteSubnet(slot) => shadow.gone("subnet", subnet_name(slot)),
            Ask::Port { port, .. } => shadow.has("port", port_name(port), id),
            Ask::DeletePort(slot) => shadow.gone("port", port_name(slot)),
            Ask::Group(slot) => shadow.has("security-group", group_name(slot), id),
            Ask::DeleteGroup(slot) => shadow.gone("security-group", group_name(slot)),
        }
    }

    /// Nothing goes wrong any more: what is there is what was promised. Then it goes.
    async fn verdicts(mut self) -> Vec<String> {
        self.rig.world.forget_faults();
        self.revive().await;
        self.plan.forget();
        self.verdict("in the end").await;
        self.restart().await;
        self.verdict("after a restart").await;
        self.delete_everything().await;
        self.shadow = Shadow::default();
        self.verdict("when all was deleted").await;
        self.defects
    }

    async fn verdict(&mut self, when: &str) {
        self.rest().await;
        // Two sweeps and what they find.
        tokio::time::sleep(3 * MINUTE).await;
        let state = adopt::load(&self.rig.store).await.unwrap();
        let mut found = judge(&self.rig).await;
        // The judge knows no ports that are made by hand; here they are in the shadow.
        found.retain(|line| !line.starts_with("quota: port `p-"));
        let orphans = self.orphans + self.cloud.as_ref().unwrap().orphans_removed();
        if orphans > 0 {
            found.push(format!("{orphans} orphans were removed"));
        }
        found.extend(self.promised(&state));
        found.extend(at_rest(&state));
        found.extend(addresses(&state));
        found.extend(self.kept(&state));
        self.defects.extend(found.into_iter().map(|line| format!("{when}: {line}")));
    }

    /// What was promised is there, and nothing else.
    fn promised(&self, state: &State) -> Vec<String> {
        let mut wrong = Vec::new();
        let is = things(state, self.tenant);
        for (thing, promised) in &self.shadow.things {
            if is.get(thing) != Some(promised) {
                wrong.push(format!("{thing:?} is {:?}, and {promised:?} was promised", is.get(thing)));
            }
        }
        let more = is.keys().filter(|thing| !self.shadow.things.contains_key(*thing));
        wrong.extend(more.map(|thing| format!("{thing:?} is there, and was not asked for")));
        for (web, power) in &self.shadow.power {
            let Some((id, _)) = self.shadow.things.get(&("instance", web_name(*web))) else { continue };
            let Some(record) = state.instances.get(&Id::from_uuid(*id)) else { continue };
            let shall = match power {
                Power::On => InstanceState::Running,
                Power::Off => InstanceState::Stopped,
            };
            if record.state() != shall {
                wrong
                    .push(format!("instance {web} is {:?} instead of {shall:?}: {record:?}", record.state()));
            }
        }
        wrong.extend(self.devices(state));
        wrong
    }

    /// Every attachment that was promised is one, and is in the machine when that runs.
    fn devices(&self, state: &State) -> Vec<String> {
        let id = |noun: &'static str, name: String| self.shadow.things.get(&(noun, name)).map(|(id, _)| *id);
        let mut left: BTreeSet<_> =
            state.attachments.values().filter(|a| !a.bind.cascade).map(|a| a.meta.id).collect();
        let mut wrong = Vec::new();
        for (web, device) in &self.shadow.attached {
            let object = match device {
                Device::Disk(slot) => {
                    id("volume", disk_name(*slot)).map(|id| Id::<Volume>::from_uuid(id).object())
                }
                Device::Nic(slot) => {
                    id("port", port_name(*slot)).map(|id| Id::<Port>::from_uuid(id).object())
                }
            };
            let found = object.and_then(|object| state.attachment_to(&object));
            let found = found.filter(|a| Some(a.spec.instance.uuid()) == id("instance", web_name(*web)));
            match found {
                Some(found) => drop(left.remove(&found.meta.id)),
                None => wrong.push(format!("{device:?} is not attached to instance {web}")),
            }
        }
        wrong.extend(left.iter().map(|id| format!("attachment {id} was not asked for")));
        for attachment in state.attachments.values() {
            let Some(instance) = state.get(attachment.spec.instance) else { continue };
            if instance.state() != InstanceState::Running {
                continue;
            }
            let vm = &instance.status.vms[&instance.bind.term.0];
            let device = vm.is.devices.get(&attachment.meta.id.uuid());
            if device != Some(&DeviceState::Present) {
                wrong.push(format!("attachment {} is {device:?}", attachment.meta.id));
            }
        }
        wrong
    }

    /// No volume of a record was ever removed, no machine either, and none was started twice for one boot.
    fn kept(&self, state: &State) -> Vec<String> {
        let volumes = state.volumes.keys().map(|id| id.cast::<PoolVolume>().object());
        let vms = state.instances.keys().map(|id| id.cast::<Vm>().object());
        let wanted: BTreeSet<ObjectRef> = volumes.chain(vms).collect();
        let effects = self.rig.world.effects().into_iter();
        let removed =
            effects.filter(|e| e.verb == "remove" && e.landed != Landed::No && wanted.contains(&e.object));
        let mut wrong: Vec<_> = removed.map(|e| format!("{} was removed once", e.object)).collect();
        let hypervisor = FakeHypervisor::open(&self.rig.world, self.rig.host);
        for instance in state.instances.values() {
            let (starts, boots) = (hypervisor.starts(instance.meta.id.cast()), instance.bind.boot.0);
            if starts > boots {
                wrong.push(format!("{} was started {starts} times for {boots} boots", instance.meta.id));
            }
        }
        wrong
    }

    /// Deletes in the order in which it is allowed, each step at rest.
    async fn delete_everything(&mut self) {
        let steps: [fn(Slot) -> Ask; 6] = [
            Ask::DeleteInstance,
            Ask::DeleteVolume,
            Ask::DeletePort,
            Ask::DeleteSubnet,
            Ask::DeleteNetwork,
            Ask::DeleteGroup,
        ];
        for (index, step) in steps.into_iter().enumerate() {
            for slot in 0..3u8 {
                let number = 1000 + 10 * index + usize::from(slot);
                self.ask(number, step(slot), Guard::None, Again::No).await;
            }
            self.rest().await;
        }
    }
}

/// What the tenant has of the things that requests are about.
fn things(state: &State, tenant: Tenant) -> BTreeMap<(&'static str, String), (uuid::Uuid, Option<u8>)> {
    let mut all = BTreeMap::new();
    let mut add = |noun, name: &str, id: uuid::Uuid, labels: &Labels| {
        let label = labels.value("n").map(|n| n.parse().unwrap());
        all.insert((noun, name.to_owned()), (id, label));
    };
    macro_rules! every {
        ($($table:ident: $noun:literal),*) => {$(
            for r in state.$table.values() {
                add($noun, r.meta.name.as_str(), r.meta.id.uuid(), &r.meta.labels);
            }
        )*};
    }
    every!(instances: "instance", volumes: "volume");
    for r in state.networks.values().filter(|r| r.meta.name.as_str() != "vpc") {
        add("network", r.meta.name.as_str(), r.meta.id.uuid(), &r.meta.labels);
    }
    for r in state.subnets.values().filter(|r| r.meta.id != tenant.subnet) {
        add("subnet", r.meta.name.as_str(), r.meta.id.uuid(), &r.meta.labels);
    }
    for r in state.security_groups.values().filter(|r| r.meta.id != tenant.group) {
        add("security-group", r.meta.name.as_str(), r.meta.id.uuid(), &r.meta.labels);
    }
    for r in state.ports.values().filter(|r| r.meta.name.as_str().starts_with("p-")) {
        add("port", r.meta.name.as_str(), r.meta.id.uuid(), &r.meta.labels);
    }
    all
}

/// Nothing is on its way, and nothing is in trouble.
fn at_rest(state: &State) -> Vec<String> {
    let mut wrong = Vec::new();
    macro_rules! every {
        ($($table:ident),*) => {$(
            for r in state.$table.values() {
                if let Some(trouble) = &r.meta.trouble {
                    wrong.push(format!("{} is in trouble: {trouble:?}", r.meta.id.object()));
                }
                if r.meta.absent.is_some() {
                    wrong.push(format!("{} is still going", r.meta.id.object()));
                }
            }
        )*};
    }
    every!(instances, volumes, attachments, ports, subnets, networks, security_groups);
    wrong
}

/// No address is given out twice in a subnet, and none outside of it.
fn addresses(state: &State) -> Vec<String> {
    let mut taken = BTreeSet::new();
    let mut wrong = Vec::new();
    for port in state.ports.values() {
        let Some(subnet) = state.get(port.spec.subnet) else {
            wrong.push(format!("port {} is in no subnet", port.meta.name));
            continue;
        };
        for address in &port.bind.addrs {
            if !taken.insert((port.spec.subnet, *address)) {
                wrong.push(format!("{address} was given out twice"));
            }
            if !subnet.spec.cidrs().iter().any(|cidr| cidr.contains(*address)) {
                wrong.push(format!("{address} lies outside of its subnet"));
            }
        }
    }
    wrong
}

type Answer = Result<uuid::Uuid, ErrorKind>;

/// A request with everything resolved: sent again, it is the same.
#[derive(Clone, Debug)]
enum Request {
    CreateInstance(Slot, Vec<Id<Volume>>, Vec<Nic>, Tenant),
    Start(Id<Instance>),
    Stop(Id<Instance>, Duration),
    Reboot(Id<Instance>),
    DeleteInstance(Id<Instance>),
    LabelInstance(Id<Instance>, Labels),
    CreateVolume(Id<Project>, Slot),
    LabelVolume(Id<Volume>, Labels),
    DeleteVolume(Id<Volume>),
    Attach(Id<Project>, String, AttachmentSpec),
    Detach(Id<Attachment>),
    CreateNetwork(Id<Project>, Slot),
    DeleteNetwork(Id<Network>),
    CreateSubnet(Id<Project>, Slot, Id<Network>),
    DeleteSubnet(Id<Subnet>),
    CreatePort(Id<Project>, Slot, Id<Subnet>),
    DeletePort(Id<Port>),
    CreateGroup(Id<Project>, Slot),
    DeleteGroup(Id<SecurityGroup>),
}

impl Request {
    /// The object that it changes, if it exists already.
    fn target(&self) -> Option<ObjectRef> {
        match self {
            Self::Start(id) | Self::Stop(id, _) | Self::Reboot(id) | Self::DeleteInstance(id) => {
                Some(id.object())
            }
            Self::LabelInstance(id, _) => Some(id.object()),
            Self::LabelVolume(id, _) | Self::DeleteVolume(id) => Some(id.object()),
            Self::Detach(id) => Some(id.object()),
            Self::DeleteNetwork(id) => Some(id.object()),
            Self::DeleteSubnet(id) => Some(id.object()),
            Self::DeletePort(id) => Some(id.object()),
            Self::DeleteGroup(id) => Some(id.object()),
            Self::CreateInstance(..)
            | Self::CreateVolume(..)
            | Self::Attach(..)
            | Self::CreateNetwork(..)
            | Self::CreateSubnet(..)
            | Self::CreatePort(..)
            | Self::CreateGroup(..) => None,
        }
    }

    async fn send(&self, root: &Session, version: Option<Rev>, token: &str) -> Result<uuid::Uuid, Error> {
        let with = With { version: version.filter(|_| self.target().is_some()), token };
        match self.clone() {
            Self::CreateInstance(slot, volumes, nics, tenant) => {
                let mut new = tenant.instance(&web_name(slot), volumes);
                new.nics = nics;
                with.send(root.instances().launch(tenant.project, new)).await
            }
            Self::Start(id) => with.send(root.instances().start(id)).await,
            Self::Stop(id, grace) => with.send(root.instances().stop(id, grace)).await,
            Self::Reboot(id) => with.send(root.instances().reboot(id)).await,
            Self::DeleteInstance(id) => with.send(root.instances().delete(id)).await,
            Self::LabelInstance(id, labels) => with.send(root.instances().update(id, labels)).await,
            Self::CreateVolume(project, slot) => {
                let spec = VolumeSpec::new(ByteSize::gib(1)).unwrap();
                with.send(root.volumes().create(project, &disk_name(slot), spec)).await
            }
            Self::LabelVolume(id, labels) => with.send(root.volumes().update(id, labels)).await,
            Self::DeleteVolume(id) => with.send(root.volumes().delete(id)).await,
            Self::Attach(project, name, spec) => {
                with.send(root.instances().attach(project, &name, spec)).await
            }
            Self::Detach(id) => with.send(root.attachments().delete(id)).await,
            Self::CreateNetwork(project, slot) => {
                with.send(root.networks().create(project, &network_name(slot), NetworkSpec::default())).await
            }
            Self::DeleteNetwork(id) => with.send(root.networks().delete(id)).await,
            Self::CreateSubnet(project, slot, network) => {
                // Six addresses at most: the pool may run dry.
                let cidr = format!("10.1.{slot}.0/29").parse().unwrap();
                let spec = SubnetSpec::new(network, vec![cidr]).unwrap();
                with.send(root.subnets().create(project, &subnet_name(slot), spec)).await
            }
            Self::DeleteSubnet(id) => with.send(root.subnets().delete(id)).await,
            Self::CreatePort(project, slot, subnet) => {
                let spec = PortSpec { subnet, groups: BTreeSet::new(), addresses: Vec::new() };
                with.send(root.ports().create(project, &port_name(slot), spec)).await
            }
            Self::DeletePort(id) => with.send(root.ports().delete(id)).await,
            Self::CreateGroup(project, slot) => {
                let spec = SecurityGroupSpec::default();
                with.send(root.security_groups().create(project, &group_name(slot), spec)).await
            }
            Self::DeleteGroup(id) => with.send(root.security_groups().delete(id)).await,
        }
    }
}

struct With<'t> {
    version: Option<Rev>,
    token: &'t str,
}

impl With<'_> {
    async fn send<A: Intent<Out = Id<R>>, R: iaas_core::Entity>(
        &self,
        change: Change<A>,
    ) -> Result<uuid::Uuid, Error> {
        let change = change.token(self.token);
        let change = match self.version {
            Some(version) => change.if_version(version),
            None => change,
        };
        change.into_future().await.map(|op| op.out.uuid())
    }
}

fn web_name(slot: Slot) -> String {
    format!("web-{slot}")
}
fn disk_name(slot: Slot) -> String {
    format!("disk-{slot}")
}
fn network_name(slot: Slot) -> String {
    format!("net-{slot}")
}
fn subnet_name(slot: Slot) -> String {
    format!("sub-{slot}")
}
fn port_name(slot: Slot) -> String {
    format!("p-{slot}")
}
fn group_name(slot: Slot) -> String {
    format!("group-{slot}")
}
fn attachment_name(web: Slot, device: Device) -> String {
    match device {
        Device::Disk(slot) => format!("a-{web}-disk-{slot}"),
        Device::Nic(slot) => format!("a-{web}-nic-{slot}"),
    }
}

/// Errors that say for certain that nothing was done, and that asking again does not help.
const REFUSALS: [ErrorKind; 6] = [
    ErrorKind::NotFound,
    ErrorKind::AlreadyExists,
    ErrorKind::Invalid,
    ErrorKind::Conflict,
    ErrorKind::QuotaExceeded,
    ErrorKind::NoCapacity,
];
const MINUTE: Duration = Duration::from_secs(60);
/// About 20 s in a build without optimization.
const CASES: u32 = 256;
