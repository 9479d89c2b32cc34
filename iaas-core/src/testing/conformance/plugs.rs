//! The contract of [`Plugs`].

use std::net::Ipv4Addr;

use async_trait::async_trait;

use super::Check;
use super::Report;
use super::Verdict;
use super::calls::Patience;
use super::calls::fresh;
use super::calls::id;
use super::calls::ours;
use super::calls::put;
use super::converge;
use super::demand;
use super::packet::Guest;
use super::packet::Packet;
use super::provider;
use super::rig::ConvergeRig;
use super::rig::Rig;
use super::rig::Wrap;
use super::rig::Wrapped;
use super::should;
use crate::Mac;
use crate::Result;
use crate::Rev;
use crate::spi::dataplane::FramePort;
use crate::spi::network::Plug;
use crate::spi::network::PlugSpec;
use crate::spi::network::Plugs;
use crate::spi::target::Target;

/// The plugs of a host under test.
///
/// The fabric's program knows the ports of [`ConvergeRig::spec`]: all in one subnet, without groups.
#[async_trait]
pub trait PlugsRig: ConvergeRig<Plug> + Rig<Provider = dyn Plugs> {
    /// The address of the port of that spec, and the subnet's router.
    fn address(&self, number: u32) -> (Mac, Ipv4Addr, Ipv4Addr);

    /// Opens a plug's target as a guest's process would.
    async fn open(&self, target: &Target) -> Result<Box<dyn FramePort>>;
}

#[async_trait]
impl<R: PlugsRig, W: Wrap<dyn Plugs>> PlugsRig for Wrapped<R, W> {
    fn address(&self, number: u32) -> (Mac, Ipv4Addr, Ipv4Addr) {
        self.inner.address(number)
    }
    async fn open(&self, target: &Target) -> Result<Box<dyn FramePort>> {
        self.inner.open(target).await
    }
}

/// The checks, in the order of the contracts.
pub fn suite() -> Vec<Check<dyn PlugsRig>> {
    let mut all = converge::checks::<Plug, dyn PlugsRig>();
    all.extend(provider::usage_checks::<Plug, dyn PlugsRig>());
    all.extend([
        Check::<dyn PlugsRig> {
            clause: "target-when-settled",
            run: |rig| Box::pin(target_when_settled(rig)),
        },
        Check { clause: "unknown-port-drops", run: |rig| Box::pin(unknown_port_drops(rig)) },
        Check { clause: "usage-counts-bytes", run: |rig| Box::pin(usage_counts_bytes(rig)) },
    ]);
    all
}

/// Runs the suite.
pub async fn run(rig: &impl PlugsRig) -> Report {
    super::run::<dyn PlugsRig>("plugs", &suite(), rig).await
}

type Rigged<'a> = &'a dyn PlugsRig;

/// A plug with a guest behind it.
async fn guest(
    rig: Rigged<'_>,
    plugs: &dyn Plugs,
    number: u32,
    spec: PlugSpec,
) -> Result<(Guest, Rev), String> {
    let seen = put(rig, plugs, &ours(1), id(), Rev(number.into()), &spec).await?;
    let target = seen.is.target.ok_or("a settled plug has no target")?;
    let (mac, addr, gateway) = rig.address(number);
    let wire = should("opening a plug", rig.open(&target).await)?;
    let mut guest = Guest::new(wire, mac, addr, gateway);
    guest.neighbours = (1..=2).map(|n| rig.address(n).1).collect();
    Ok((guest, seen.is.program))
}

async fn target_when_settled(rig: Rigged<'_>) -> Verdict {
    let plugs = fresh(rig).await?;
    let spec = rig.spec(1);
    let seen = put(rig, &*plugs, &ours(1), id(), Rev(1), &spec).await?;
    let target = seen.is.target.ok_or("a settled plug has no target")?;
    let (is, wants) = ((target.id, target.term), (spec.port.uuid(), spec.term));
    demand!(is == wants, "the target is {is:?}, the spec says {wants:?}");
    demand!(seen.is.program > Rev(0), "the program knows the port, and the plug does not say so");
    Ok(())
}

async fn unknown_port_drops(rig: Rigged<'_>) -> Verdict {
    let plugs = fresh(rig).await?;
    let (mut known, _) = guest(rig, &*plugs, 1, rig.spec(1)).await?;
    let unknown = PlugSpec { port: id(), ..rig.spec(2) };
    let (mut stranger, program) = guest(rig, &*plugs, 2, unknown).await?;
    demand!(program == Rev(0), "the program does not know the port, and the plug says {program}");
    let packet =
        Packet { src: stranger.addr, dst: known.addr, protocol: 17, ports: (1, 2), nonce: 0xfeed_beef };
    stranger.send_packet(known.mac, &packet)?;
    let (mac, addr) = (stranger.mac, stranger.addr);
    known.send_packet(mac, &Packet { src: known.addr, dst: addr, nonce: 0xdead_cafe, ..packet })?;
    let patience = Patience::new(std::time::Duration::from_millis(200));
    while patience.wait(String::new).await.is_ok() {
        known.poll()?;
        stranger.poll()?;
    }
    demand!(!known.has(0xfeed_beef), "a port that the program does not know could send");
    demand!(stranger.received.is_empty(), "a port that the program does not know received a frame");
    Ok(())
}

async fn usage_counts_bytes(rig: Rigged<'_>) -> Verdict {
    let plugs = fresh(rig).await?;
    let (mut a, _) = guest(rig, &*plugs, 1, rig.spec(1)).await?;
    let (mut b, _) = guest(rig, &*plugs, 2, rig.spec(2)).await?;
    let mac = a.resolve(b.addr, &mut [&mut b], rig.patience()).await?.unwrap_or(b.mac);
    let packet = Packet { src: a.addr, dst: b.addr, protocol: 17, ports: (5, 6), nonce: 0x0123_4567_89ab };
    a.send_packet(mac, &packet)?;
    let patience = Patience::new(rig.patience());
    while !b.has(packet.nonce) {
        patience.wait(|| "a packet between two ports did not arrive".to_owned()).await?;
        b.poll()?;
    }
    a.poll()?;
    for (number, tx, rx) in [(1, a.tx, a.rx), (2, b.tx, b.rx)] {
        let want = [("tx-packets", tx.0), ("tx-bytes", tx.1), ("rx-packets", rx.0), ("rx-bytes", rx.1)];
        counted(rig, &*plugs, number, &want).await?;
    }
    Ok(())
}

/// Waits until the readings are what the guest has counted.
async fn counted(rig: Rigged<'_>, plugs: &dyn Plugs, number: u32, want: &[(&str, u64)]) -> Verdict {
    let port = rig.spec(number).port.object();
    let patience = Patience::new(rig.patience());
    loop {
        let readings = should("usage", plugs.usage(&ours(1), None, 100).await)?;
        let reading = readings.iter().find(|r| r.of == port).ok_or("a port has no reading")?;
        let is = |(meter, count): &(&str, u64)| reading.totals.get(*meter) == Some(&u128::from(*count));
        if want.iter().all(is) {
            return Ok(());
        }
        patience.wait(|| format!("the guest counted {want:?}, usage says {:?}", reading.totals)).await?;
    }
}
