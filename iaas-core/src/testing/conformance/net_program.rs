//! The contract of [`NetProgram`], and what the wire really does.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Duration;

use async_trait::async_trait;

use super::Check;
use super::Report;
use super::Verdict;
use super::calls::Patience;
use super::calls::fresh;
use super::calls::id;
use super::calls::ours;
use super::calls::reopen;
use super::demand;
use super::packet::Guest;
use super::packet::Packet;
use super::provider;
use super::rig::Rig;
use super::rig::Wrap;
use super::rig::Wrapped;
use super::should;
use super::should_fail;
use crate::ErrorKind;
use crate::Id;
use crate::Mac;
use crate::PortRange;
use crate::Result;
use crate::Rev;
use crate::model::Network;
use crate::model::Port;
use crate::model::SecurityGroup;
use crate::model::Subnet;
use crate::model::security_group::Direction;
use crate::model::security_group::Protocol;
use crate::model::security_group::Remote;
use crate::model::security_group::Rule;
use crate::spi::dataplane::FramePort;
use crate::spi::network::NetObject;
use crate::spi::network::NetProgram;
use crate::spi::network::NetUpdate;
use crate::spi::network::PacketQuery;
use crate::spi::network::Synced;
use crate::spi::network::Verdict as Fate;

/// A network under test.
#[async_trait]
pub trait NetRig: Rig<Provider = dyn NetProgram> {
    /// Plugs a port in on a host of the fabric, after the program knows it, and opens its wire.
    async fn plug(&self, port: Id<Port>) -> Result<Box<dyn FramePort>>;

    /// How long a frame that is not dropped may take to arrive; a dropped one is waited for as long.
    fn transit(&self) -> Duration {
        Duration::from_millis(500)
    }
}

/// What a wrap may do to the wires of a network.
pub(crate) trait WrapPort: Send + Sync {
    fn port(&self, _port: Id<Port>, wire: Box<dyn FramePort>) -> Box<dyn FramePort> {
        wire
    }
}

#[async_trait]
impl<R: NetRig, W: Wrap<dyn NetProgram> + WrapPort> NetRig for Wrapped<R, W> {
    async fn plug(&self, port: Id<Port>) -> Result<Box<dyn FramePort>> {
        Ok(self.by.port(port, self.inner.plug(port).await?))
    }
    fn transit(&self) -> Duration {
        self.inner.transit()
    }
}

/// The checks, in the order of the contracts.
pub fn suite() -> Vec<Check<dyn NetRig>> {
    let mut all = provider::checks::<dyn NetRig>();
    all.extend([
        Check::<dyn NetRig> { clause: "sync-atomic", run: |rig| Box::pin(sync_atomic(rig)) },
        Check { clause: "sync-full-replaces", run: |rig| Box::pin(sync_full_replaces(rig)) },
        Check { clause: "sync-mismatch-needs-full", run: |rig| Box::pin(sync_mismatch_needs_full(rig)) },
        Check { clause: "sync-survives-reopen", run: |rig| Box::pin(sync_survives_reopen(rig)) },
        Check { clause: "bad-program-refused", run: |rig| Box::pin(bad_program_refused(rig)) },
        Check { clause: "explain-agrees", run: |rig| Box::pin(explain_agrees(rig)) },
        Check { clause: "isolation", run: |rig| Box::pin(isolation(rig)) },
        Check { clause: "antispoof", run: |rig| Box::pin(antispoof(rig)) },
    ]);
    all
}

/// Runs the suite.
pub async fn run(rig: &impl NetRig) -> Report {
    super::run::<dyn NetRig>("net program", &suite(), rig).await
}

type Rigged<'a> = &'a dyn NetRig;

/// Two VPCs. In the first `web` and `near` share a subnet and `far` is in another; `web` takes only ICMP and TCP 8080, from
/// members of its group: itself and `near`. In the second `alien` has an address of the first one's prefix.
struct Town {
    networks: [Id<Network>; 2],
    subnets: [Id<Subnet>; 3],
    group: Id<SecurityGroup>,
    web: Inhabitant,
    near: Inhabitant,
    far: Inhabitant,
    alien: Inhabitant,
}

#[derive(Clone, Copy)]
struct Inhabitant {
    id: Id<Port>,
    mac: Mac,
    addr: Ipv4Addr,
    gateway: Ipv4Addr,
}

impl Inhabitant {
    fn new(number: u8, addr: [u8; 4]) -> Self {
        let gateway = Ipv4Addr::new(addr[0], addr[1], addr[2], 1);
        Self { id: id(), mac: Mac([2, 0, 0, 0, 1, number]), addr: addr.into(), gateway }
    }
}

impl Town {
    fn new() -> Self {
        Self {
            networks: [id(), id()],
            subnets: [id(), id(), id()],
            group: id(),
            web: Inhabitant::new(1, [10, 0, 1, 10]),
            near: Inhabitant::new(2, [10, 0, 1, 11]),
            far: Inhabitant::new(3, [10, 0, 2, 10]),
            alien: Inhabitant::new(4, [10, 0, 1, 12]),
        }
    }

    fn program(&self) -> Vec<NetObject> {
        let network = |i: usize, vni| NetObject::Network { id: self.networks[i], vni, mtu: 1500 };
        let subnet = |i: usize, network: usize, cidr: &str| NetObject::Subnet {
            id: self.subnets[i],
            network: self.networks[network],
            cidrs: cidr.parse().into_iter().collect(),
            dns: Vec::new(),
        };
        let group = BTreeSet::from([self.group]);
        let port = |who: Inhabitant, subnet: usize, groups| NetObject::Port {
            id: who.id,
            subnet: self.subnets[subnet],
            mac: who.mac,
            addrs: vec![who.addr.into()],
            groups,
        };
        vec![
            network(0, 100),
            network(1, 101),
            subnet(0, 0, "10.0.1.0/24"),
            subnet(1, 0, "10.0.2.0/24"),
            subnet(2, 1, "10.0.1.0/24"),
            NetObject::SecurityGroup { id: self.group, rules: self.rules() },
            port(self.web, 0, group.clone()),
            port(self.near, 0, group),
            port(self.far, 1, BTreeSet::new()),
            port(self.alien, 2, BTreeSet::new()),
        ]
    }

    fn rules(&self) -> Vec<Rule> {
        let rule = |direction, protocol, ports, remote| Rule { direction, protocol, ports, remote };
        let members = Remote::Group(self.group);
        vec![
            rule(Direction::Ingress, Protocol::Icmp, PortRange::ALL, members),
            rule(Direction::Ingress, Protocol::Tcp, PortRange::one(8080), members),
            rule(Direction::Egress, Protocol::Any, PortRange::ALL, Remote::Any),
        ]
    }
}

/// A network with the town as its program.
async fn town(rig: Rigged<'_>) -> Result<(std::sync::Arc<dyn NetProgram>, Town), String> {
    let net = fresh(rig).await?;
    let town = Town::new();
    full(&*net, 5, town.program()).await?;
    Ok((net, town))
}

async fn full(net: &dyn NetProgram, rev: u64, put: Vec<NetObject>) -> Verdict {
    let update = NetUpdate { from: None, to: Rev(rev), put, drop: Vec::new() };
    let synced = should("a full update", net.sync(&ours(1), &update).await)?;
    demand!(synced == Synced::At(Rev(rev)), "a full update to {rev} was answered by {synced:?}");
    Ok(())
}

fn query(from: Inhabitant, dst: Inhabitant, protocol: u8, port: u16) -> PacketQuery {
    PacketQuery {
        from: from.id,
        src: None,
        dst: dst.addr.into(),
        protocol,
        src_port: if protocol == 1 { 0 } else { 40_000 },
        dst_port: port,
    }
}

async fn sync_atomic(rig: Rigged<'_>) -> Verdict {
    let (net, town) = town(rig).await?;
    let writer = async {
        for rev in 6..40 {
            let mut program = town.program();
            if rev % 2 == 0 {
                program.reverse();
            }
            full(&*net, rev, program).await?;
            tokio::task::yield_now().await;
        }
        Ok::<(), String>(())
    };
    let reader = async {
        let (mut seen, mut looks) = (Rev(0), 0);
        while seen < Rev(39) && looks < 100_000 {
            let trace = net.explain(&ours(1), &query(town.near, town.web, 6, 8080)).await;
            let trace = should("explain during an update", trace)?;
            let whole = trace.verdict == Fate::Delivered(town.web.id);
            demand!(whole, "a packet that both programs deliver was {:?} during an update", trace.verdict);
            demand!(trace.program >= seen, "the program went back from {seen} to {}", trace.program);
            (seen, looks) = (trace.program, looks + 1);
            tokio::task::yield_now().await;
        }
        Ok::<(), String>(())
    };
    let (wrote, read) = tokio::join!(writer, reader);
    read.and(wrote)
}

async fn sync_full_replaces(rig: Rigged<'_>) -> Verdict {
    let (net, town) = town(rig).await?;
    let mut program = town.program();
    program.retain(|o| !matches!(o, NetObject::Port { id, .. } if *id == town.far.id));
    full(&*net, 6, program).await?;
    let trace = should("explain", net.explain(&ours(1), &query(town.near, town.far, 1, 0)).await)?;
    demand!(trace.verdict == Fate::Dropped, "a port that the new program lacks is {:?}", trace.verdict);
    demand!(trace.program == Rev(6), "the program is at {}", trace.program);
    Ok(())
}

async fn sync_mismatch_needs_full(rig: Rigged<'_>) -> Verdict {
    let (net, town) = town(rig).await?;
    let update =
        NetUpdate { from: Some(Rev(3)), to: Rev(9), put: Vec::new(), drop: vec![town.web.id.object()] };
    let synced = should("an update from another revision", net.sync(&ours(1), &update).await)?;
    demand!(synced == Synced::NeedFull, "an update from another revision was answered by {synced:?}");
    let older = NetUpdate { from: None, to: Rev(4), put: Vec::new(), drop: Vec::new() };
    should_fail("an older program", ErrorKind::Conflict, net.sync(&ours(1), &older).await)?;
    let trace = should("explain", net.explain(&ours(1), &query(town.near, town.web, 1, 0)).await)?;
    let kept = (trace.program, trace.verdict) == (Rev(5), Fate::Delivered(town.web.id));
    demand!(kept, "a refused update changed the program: {trace:?}");
    Ok(())
}

async fn sync_survives_reopen(rig: Rigged<'_>) -> Verdict {
    let (net, town) = town(rig).await?;
    let net = reopen(rig, net).await?;
    let trace =
        should("explain after a restart", net.explain(&ours(1), &query(town.near, town.web, 1, 0)).await)?;
    let kept = (trace.program, trace.verdict) == (Rev(5), Fate::Delivered(town.web.id));
    demand!(kept, "after a restart the program is another: {trace:?}");
    Ok(())
}

async fn bad_program_refused(rig: Rigged<'_>) -> Verdict {
    let (net, town) = town(rig).await?;
    let mut dangling = town.program();
    dangling.retain(|o| !matches!(o, NetObject::Subnet { id, .. } if *id == town.subnets[0]));
    let mut lost_group = town.program();
    lost_group.retain(|o| !matches!(o, NetObject::SecurityGroup { .. }));
    let mut overlap = town.program();
    overlap.push(NetObject::Subnet {
        id: id(),
        network: town.networks[0],
        cidrs: "10.0.1.128/25".parse().into_iter().collect(),
        dns: Vec::new(),
    });
    for (what, put) in
        [("a port without its subnet", dangling), ("a lost group", lost_group), ("overlap", overlap)]
    {
        let update = NetUpdate { from: None, to: Rev(8), put, drop: Vec::new() };
        should_fail(what, ErrorKind::Invalid, net.sync(&ours(1), &update).await)?;
        let trace = should("explain", net.explain(&ours(1), &query(town.near, town.web, 1, 0)).await)?;
        demand!(trace.program == Rev(5), "{what} was refused, but the program is at {}", trace.program);
    }
    Ok(())
}

/// The wires of the town.
struct Wires {
    web: Guest,
    near: Guest,
    far: Guest,
    alien: Guest,
}

impl Wires {
    async fn open(rig: Rigged<'_>, town: &Town) -> Result<Self, String> {
        let guest = async |who: Inhabitant, neighbours: &[Inhabitant]| {
            let wire = should("plugging a port in", rig.plug(who.id).await)?;
            let mut guest = Guest::new(wire, who.mac, who.addr, who.gateway);
            guest.neighbours = neighbours.iter().map(|n| n.addr).collect();
            Ok::<_, String>(guest)
        };
        Ok(Self {
            web: guest(town.web, &[town.near]).await?,
            near: guest(town.near, &[town.web]).await?,
            far: guest(town.far, &[]).await?,
            // It believes that `web` is beside it, to try to reach it.
            alien: guest(town.alien, &[town.web]).await?,
        })
    }
}

/// Sends a packet and says whether it arrived at `to`.
async fn arrives(
    from: &mut Guest,
    to: &mut Guest,
    src: Ipv4Addr,
    protocol: u8,
    port: u16,
    within: Duration,
) -> Result<bool, String> {
    // Without an answer it is sent all the same, to the receiver's own address.
    let (dst, mac) = (to.addr, to.mac);
    let next = from.resolve(dst, &mut [to], within).await?.unwrap_or(mac);
    let nonce = u64::from_be_bytes(*uuid::Uuid::new_v4().as_bytes().first_chunk().unwrap_or(&[7; 8]));
    let ports = if protocol == 1 { (0, 0) } else { (40_000, port) };
    from.send_packet(next, &Packet { src, dst, protocol, ports, nonce })?;
    let patience = Patience::new(within);
    loop {
        to.poll()?;
        from.poll()?;
        if to.has(nonce) {
            return Ok(true);
        }
        if patience.wait(String::new).await.is_err() {
            return Ok(false);
        }
    }
}

async fn explain_agrees(rig: Rigged<'_>) -> Verdict {
    let (net, town) = town(rig).await?;
    let mut wires = Wires::open(rig, &town).await?;
    // Each is the first packet of its flow.
    for (protocol, port) in [(6, 8080), (6, 22), (17, 53), (1, 0)] {
        let pairs = [(&mut wires.near, town.near), (&mut wires.far, town.far)];
        for (guest, who) in pairs {
            let trace = net.explain(&ours(1), &query(who, town.web, protocol, port)).await;
            let trace = should("explain", trace)?;
            let src = guest.addr;
            let arrived = arrives(guest, &mut wires.web, src, protocol, port, rig.transit()).await?;
            let says = trace.verdict == Fate::Delivered(town.web.id);
            demand!(
                says == arrived,
                "protocol {protocol}, port {port} from {}: explain says {:?}, and it arrived: {arrived}",
                who.addr,
                trace.verdict
            );
            let last = trace.stages.last().is_some_and(|stage| stage.passed == says);
            demand!(last, "the last stage of the trace is not the one that decided: {trace:?}");
        }
    }
    let expected = arrives(&mut wires.near, &mut wires.web, town.near.addr, 6, 8080, rig.transit()).await?;
    demand!(expected, "what the rules allow does not arrive, so nothing was shown");
    Ok(())
}

async fn isolation(rig: Rigged<'_>) -> Verdict {
    let (net, town) = town(rig).await?;
    let mut wires = Wires::open(rig, &town).await?;
    let trace = should("explain", net.explain(&ours(1), &query(town.alien, town.far, 1, 0)).await)?;
    demand!(trace.verdict == Fate::Dropped, "explain says {:?} between two VPCs", trace.verdict);
    for protocol in [1, 17] {
        let src = wires.alien.addr;
        let crossed = arrives(&mut wires.alien, &mut wires.web, src, protocol, 8080, rig.transit()).await?;
        demand!(!crossed, "a packet of protocol {protocol} passed from one VPC to another");
        let crossed = arrives(&mut wires.alien, &mut wires.far, src, protocol, 8080, rig.transit()).await?;
        demand!(!crossed, "a packet of protocol {protocol} was routed from one VPC to another");
    }
    Ok(())
}

async fn antispoof(rig: Rigged<'_>) -> Verdict {
    let (net, town) = town(rig).await?;
    let mut wires = Wires::open(rig, &town).await?;
    let spoofed = PacketQuery { src: Some(town.near.addr.into()), ..query(town.far, town.near, 17, 53) };
    let trace = should("explain", net.explain(&ours(1), &spoofed).await)?;
    demand!(trace.verdict == Fate::Dropped, "explain says {:?} of another's source address", trace.verdict);
    // `far` has no group and `near` may send anything: only the false source stops this.
    let lie = Ipv4Addr::new(10, 0, 2, 77);
    let passed = arrives(&mut wires.near, &mut wires.far, lie, 17, 53, rig.transit()).await?;
    demand!(!passed, "a packet with another source address than the port's passed");
    let honest = wires.near.addr;
    let passed = arrives(&mut wires.near, &mut wires.far, honest, 17, 53, rig.transit()).await?;
    demand!(passed, "an honest packet does not pass, so nothing was shown");
    Ok(())
}
