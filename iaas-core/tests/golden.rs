//! The encoding of every value that crosses or is stored, byte for byte.
//!
//! `tests/golden/NAME.cbor` is what this version writes. `tests/golden/NAME.OLD.cbor` is what an earlier one wrote, and must
//! still be read. After a wanted change run `GOLDEN=write cargo test -p iaas-core --test golden`, and keep the old file under
//! the name of its version.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use iaas_core::Boot;
use iaas_core::Digest;
use iaas_core::Epoch;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::Mac;
use iaas_core::ObjectRef;
use iaas_core::PortRange;
use iaas_core::Rev;
use iaas_core::Term;
use iaas_core::model::security_group::Direction;
use iaas_core::model::security_group::Protocol;
use iaas_core::model::security_group::Remote;
use iaas_core::model::security_group::Rule;
use iaas_core::spi::Call;
use iaas_core::spi::Found;
use iaas_core::spi::Hello;
use iaas_core::spi::Phase;
use iaas_core::spi::Reading;
use iaas_core::spi::Seen;
use iaas_core::spi::Site;
use iaas_core::spi::Stamp;
use iaas_core::spi::Tag;
use iaas_core::spi::block::Access;
use iaas_core::spi::block::AccessObserved;
use iaas_core::spi::block::AccessSpec;
use iaas_core::spi::block::Fenced;
use iaas_core::spi::block::Health;
use iaas_core::spi::block::PoolVolume;
use iaas_core::spi::block::PoolVolumeObserved;
use iaas_core::spi::block::PoolVolumeSpec;
use iaas_core::spi::block::Qos;
use iaas_core::spi::contract::SealKey;
use iaas_core::spi::contract::Sealed;
use iaas_core::spi::host::CpuFacts;
use iaas_core::spi::host::HostFacts;
use iaas_core::spi::hypervisor::Device;
use iaas_core::spi::hypervisor::DeviceState;
use iaas_core::spi::hypervisor::End;
use iaas_core::spi::hypervisor::Life;
use iaas_core::spi::hypervisor::Origin;
use iaas_core::spi::hypervisor::Right;
use iaas_core::spi::hypervisor::Run;
use iaas_core::spi::hypervisor::Vm;
use iaas_core::spi::hypervisor::VmObserved;
use iaas_core::spi::hypervisor::VmSpec;
use iaas_core::spi::key::KeyName;
use iaas_core::spi::key::WrappedKey;
use iaas_core::spi::meter::Bill;
use iaas_core::spi::meter::BillLine;
use iaas_core::spi::meter::Usage;
use iaas_core::spi::meter::UsageEvent;
use iaas_core::spi::meter::UsageKey;
use iaas_core::spi::network::NetObject;
use iaas_core::spi::network::NetUpdate;
use iaas_core::spi::network::PacketQuery;
use iaas_core::spi::network::Plug;
use iaas_core::spi::network::PlugObserved;
use iaas_core::spi::network::PlugSpec;
use iaas_core::spi::network::Synced;
use iaas_core::spi::network::Trace;
use iaas_core::spi::network::TraceStage;
use iaas_core::spi::network::Verdict;
use iaas_core::spi::remote::decode;
use iaas_core::spi::remote::encode;
use iaas_core::spi::target::Form;
use iaas_core::spi::target::Mode;
use iaas_core::spi::target::Target;
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// Compares the encoding of `value` with its file, and reads the files of earlier versions.
fn golden<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, value: &T) {
    let (bytes, file) = (encode(value).unwrap(), folder().join(format!("{name}.cbor")));
    if std::env::var_os("GOLDEN").is_some_and(|v| v == "write") {
        fs::create_dir_all(folder()).unwrap();
        fs::write(&file, &bytes).unwrap();
    }
    let kept =
        fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}; see the head of this test", file.display()));
    assert_eq!(kept, bytes, "{name} is encoded differently now; see the head of this test");
    assert_eq!(&decode::<T>(&kept).unwrap(), value, "{name} does not read back");
    for old in fs::read_dir(folder()).unwrap().map(|f| f.unwrap().path()) {
        let file = old.file_name().unwrap().to_string_lossy().into_owned();
        if file.starts_with(&format!("{name}.")) && file != format!("{name}.cbor") {
            decode::<T>(&fs::read(&old).unwrap())
                .unwrap_or_else(|e| panic!("{file} is not read any more: {e:#}"));
        }
    }
}

fn uuid(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

fn id<K>(n: u128) -> Id<K> {
    Id::from_uuid(uuid(n))
}

fn stamp() -> Stamp {
    Stamp { wall: "2026-11-24T10:00:00.5Z".parse().unwrap(), boot_id: uuid(7), mono_ns: 1_500_000_000 }
}

fn object() -> ObjectRef {
    id::<Vm>(1).object()
}

fn reading() -> Reading {
    let totals = [("memory-byte-ns".to_owned(), u128::from(u64::MAX) + 1), ("vcpu-ns".to_owned(), 120)];
    Reading { of: object(), term: Term(1), life: 2, seq: 3, fin: true, at: stamp(), totals: totals.into() }
}

fn target() -> Target {
    let form = Form::Opener { scheme: "fake".into(), version: 1, token: Bytes::from_static(&[1, 2, 3]) };
    let seal = SealKey(Bytes::from_static(&[9; 4]));
    let key = Sealed { to: seal, aad: Bytes::from_static(b"aad"), body: Bytes::from_static(b"body") };
    Target {
        id: uuid(4),
        term: Term(5),
        mode: Mode::Write,
        forms: vec![form, Form::RawFile("/volumes/4".into())],
        key: Some(key),
    }
}

fn seen<K: iaas_core::spi::Kind>(is: K::Observed) -> Seen<K> {
    Seen { applied: Rev(6), phase: Phase::Settled, at: stamp(), is, final_usage: vec![reading()] }
}

#[test]
fn what_every_call_carries() {
    let call = Call {
        cloud: id(1),
        incarnation: uuid(2),
        epoch: Epoch(3),
        op: id(4),
        trace: Some("00-trace".into()),
        budget: Duration::from_millis(1500),
    };
    golden("call", &call);
    golden("stamp", &stamp());
    golden("reading", &reading());
    let error = Error::conflict("it is newer").remedy("look again").about(object()).detail("rev 7");
    golden("error", &error.retry_in(Duration::from_secs(2)));
    let hello = Hello {
        product: "a product 1.0".into(),
        protocol: (1, 2),
        site: Site::Host(id(8)),
        install: uuid(9),
        newest: Some((uuid(2), Epoch(3), Rev(6))),
        seal_to: Some(SealKey(Bytes::from_static(&[9; 4]))),
        kinds: BTreeSet::from(["vm".to_owned()]),
        caps: BTreeSet::from(["hotplug".to_owned()]),
    };
    golden("hello", &hello);
}

#[test]
fn phases() {
    let error = || Error::unavailable("not yet");
    let working = Phase::Working { done: 1, total: Some(2), poll_in: Duration::from_millis(200) };
    golden(
        "phases",
        &vec![Phase::Settled, working, Phase::Blocked(error()), Phase::Broken(error()), Phase::Leaving],
    );
}

#[test]
fn virtual_machines() {
    let kernel = Origin::Kernel {
        kernel: Digest::of(b"kernel"),
        initrd: Some(Digest::of(b"initrd")),
        cmdline: "console=ttyS0".into(),
    };
    let devices = BTreeMap::from([
        (uuid(20), Device::Disk { target: target(), boot: Some(0) }),
        (uuid(21), Device::Nic { target: target(), mac: Mac([2, 0, 0, 0, 0, 1]) }),
        (uuid(22), Device::Share { target: target(), tag: "share".into() }),
        (uuid(23), Device::HostDevice { name: "0000:01:00.0".into(), claim: Term(1) }),
    ]);
    let spec = |run, origin| VmSpec {
        term: Term(1),
        run,
        vcpus: 2,
        memory: 1 << 30,
        origin,
        devices: devices.clone(),
        lease: Some(Duration::from_secs(30)),
        metadata: None,
        passport: Bytes::from_static(b"passport"),
    };
    golden("vm-spec", &spec(Run::On(Boot(3)), kernel));
    let others = [
        spec(Run::Off { grace: Duration::from_secs(30) }, Origin::Disk),
        spec(Run::Paused(Boot(1)), Origin::Firmware(Digest::of(b"firmware"))),
        spec(Run::On(Boot(1)), Origin::Image { image: id(30), fork: true }),
        spec(Run::On(Boot(1)), Origin::Incoming { from: Term(1), open: true }),
    ];
    golden("vm-specs", &others.to_vec());
    let observed = VmObserved {
        life: Life::Ended { boot: Boot(3), why: End::Crashed(Error::internal("killed")) },
        changed: Some(stamp()),
        right: Right::Holds(Term(1)),
        devices: BTreeMap::from([
            (uuid(20), DeviceState::Present),
            (uuid(21), DeviceState::Unplugging { since: stamp() }),
            (uuid(22), DeviceState::Failed(Error::unsupported("no shares"))),
        ]),
        accepts: vec![("fake".into(), 1)],
        restart_for: vec!["vcpus".into()],
    };
    golden("vm-seen", &seen::<Vm>(observed.clone()));
    let tag = Tag { cloud: id(1), incarnation: uuid(2), rev: Rev(6) };
    let passport = Some(Bytes::from_static(b"passport"));
    golden("vm-found", &Found::<Vm> { id: id(1), tag, passport, seen: Ok(seen(observed)) });
    let unreadable = Found::<Vm> { id: id(1), tag, passport: None, seen: Err(Error::internal("damaged")) };
    golden("vm-found-unreadable", &unreadable);
}

#[test]
fn block_storage() {
    let spec = PoolVolumeSpec {
        size: 1 << 30,
        from: None,
        qos: Qos { iops: Some(1000), bandwidth: None },
        key: Some(WrappedKey { by: KeyName("volumes".into()), body: Bytes::from_static(b"wrapped") }),
        passport: Bytes::new(),
    };
    golden("pool-volume-spec", &spec);
    let observed = PoolVolumeObserved {
        size: 1 << 30,
        unique: 4096,
        writer: Term(5),
        health: Health::Damaged { bytes: 512 },
    };
    golden("pool-volume-seen", &seen::<PoolVolume>(observed));
    golden("access-spec", &AccessSpec { pool: id(40), volume: id(41), term: Term(5), mode: Mode::Standby });
    golden("access-seen", &seen::<Access>(AccessObserved { target: Some(target()) }));
    golden("fenced", &vec![Fenced::Impossible, Fenced::SameKernel, Fenced::Done(Term(5))]);
}

#[test]
fn networks() {
    let rule = |direction, protocol, ports, remote| Rule { direction, protocol, ports, remote };
    let rules = vec![
        rule(Direction::Ingress, Protocol::Tcp, PortRange::one(8080), Remote::Group(id(53))),
        rule(Direction::Ingress, Protocol::Icmp, PortRange::ALL, Remote::Any),
        rule(Direction::Egress, Protocol::Any, PortRange::ALL, Remote::Cidr("10.0.0.0/8".parse().unwrap())),
    ];
    let put = vec![
        NetObject::Network { id: id(50), vni: 100, mtu: 1500 },
        NetObject::Subnet {
            id: id(51),
            network: id(50),
            cidrs: vec!["10.0.1.0/24".parse().unwrap(), "fd00:1::/64".parse().unwrap()],
            dns: vec!["10.0.1.1".parse().unwrap()],
        },
        NetObject::SecurityGroup { id: id(53), rules },
        NetObject::Port {
            id: id(54),
            subnet: id(51),
            mac: Mac([2, 0, 0, 0, 0, 1]),
            addrs: vec!["10.0.1.10".parse().unwrap(), "fd00:1::10".parse().unwrap()],
            groups: BTreeSet::from([id(53)]),
        },
    ];
    golden("net-update", &NetUpdate { from: None, to: Rev(6), put, drop: vec![object()] });
    golden("synced", &vec![Synced::At(Rev(6)), Synced::NeedFull]);
    let query = PacketQuery {
        from: id(54),
        src: None,
        dst: "fd00:1::11".parse().unwrap(),
        protocol: 6,
        src_port: 40_000,
        dst_port: 8080,
    };
    golden("packet-query", &query);
    let stage = TraceStage {
        stage: "security_group".into(),
        passed: false,
        because: "no rule".into(),
        by: Some(object()),
    };
    golden("trace", &Trace { program: Rev(6), stages: vec![stage], verdict: Verdict::Dropped });
    golden("verdicts", &vec![Verdict::Delivered(id(54)), Verdict::Answered, Verdict::Dropped]);
    golden("plug-spec", &PlugSpec { port: id(54), term: Term(1), queues: 2 });
    let observed = PlugObserved { target: Some(target()), program: Rev(6), peer_up: true };
    golden("plug-seen", &seen::<Plug>(observed));
}

#[test]
fn hosts_and_bills() {
    let cpu = CpuFacts { model: Some("a CPU".into()), threads: 8, cores: Some(4), ..CpuFacts::default() };
    golden("host-facts", &HostFacts { cpu: Some(cpu), memory: Some(1 << 33), ..HostFacts::default() });
    let allocated =
        Usage::Allocated { of: object(), meter: "vcpu".into(), quantity: 2, order: 1, at: stamp().wall };
    let key = UsageKey::Commit { incarnation: uuid(2), rev: Rev(6), index: 0 };
    golden("usage-allocated", &UsageEvent { project: id(60), key, what: allocated });
    let key = UsageKey::Reading { of: object(), term: 1, life: 2, seq: 3 };
    golden("usage-counted", &UsageEvent { project: id(60), key, what: Usage::Counted(reading()) });
    let line = BillLine {
        resource: object(),
        meter: "vcpu".into(),
        quantity: "1.5".into(),
        unit: "vCPU-hours".into(),
        unit_price: "0.02".into(),
        cost: "0.03".into(),
    };
    let bill = Bill {
        project: id(60),
        from: "2026-11-01T00:00:00Z".parse().unwrap(),
        to: "2026-12-01T00:00:00Z".parse().unwrap(),
        currency: "EUR".into(),
        price_book: id(61),
        lines: vec![line],
        total: "0.03".into(),
    };
    golden("bill", &bill);
}
