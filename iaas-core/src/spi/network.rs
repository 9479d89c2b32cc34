//! The network: one program per fabric, plugs per host, and the reason for each dropped packet.

use std::collections::BTreeSet;
use std::net::IpAddr;

use async_trait::async_trait;
use serde::Deserialize;
use serde::Serialize;

use super::Converge;
use super::Ctx;
use super::Provider;
use super::contract::kind;
use super::target::Target;
use crate::Cidr;
use crate::Id;
use crate::Mac;
use crate::ObjectRef;
use crate::Result;
use crate::Rev;
use crate::Term;
use crate::model::Network;
use crate::model::Port;
use crate::model::SecurityGroup;
use crate::model::Subnet;
use crate::model::security_group::Rule;

kind!(
    /// The socket in the wall of one host for one port. It shares its UUID with the port's attachment.
    Plug, "plug", holds_data: false, PlugSpec => PlugObserved
);

/// A port to plug in on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlugSpec {
    /// Which port.
    pub port: Id<Port>,
    /// The placement of its instance.
    pub term: Term,
    /// Pairs of queues.
    pub queues: u16,
}

/// A plug as it was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlugObserved {
    /// How to open it.
    pub target: Option<Target>,
    /// The revision of the program that this port forwards by; zero if none knows the port.
    pub program: Rev,
    /// Whether the VM's side is connected.
    pub peer_up: bool,
}

/// A change of the program of a fabric.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetUpdate {
    /// The revision that it changes; `None`: `put` is everything.
    pub from: Option<Rev>,
    /// The revision that it leads to.
    pub to: Rev,
    /// Objects that are new or changed.
    pub put: Vec<NetObject>,
    /// Objects that are gone.
    pub drop: Vec<ObjectRef>,
}

/// An object of the program, fully resolved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetObject {
    /// A VPC: its subnets route to each other and to nothing else.
    Network {
        /// Which.
        id: Id<Network>,
        /// Virtual network identifier, 24 bits.
        vni: u32,
        /// The largest IP packet in bytes.
        mtu: u16,
    },
    /// A subnet. The router answers on the first host address of each prefix.
    Subnet {
        /// Which.
        id: Id<Subnet>,
        /// Of which VPC.
        network: Id<Network>,
        /// Its prefixes: at most one of each family.
        cidrs: Vec<Cidr>,
        /// Name servers to announce.
        dns: Vec<IpAddr>,
    },
    /// A security group. Traffic that no rule of any group of the port allows is dropped.
    SecurityGroup {
        /// Which.
        id: Id<SecurityGroup>,
        /// What is allowed.
        rules: Vec<Rule>,
    },
    /// A port. It may send only from its own addresses.
    Port {
        /// Which.
        id: Id<Port>,
        /// In which subnet.
        subnet: Id<Subnet>,
        /// Its Ethernet address.
        mac: Mac,
        /// Its addresses.
        addrs: Vec<IpAddr>,
        /// Its groups; with none, all traffic is allowed.
        groups: BTreeSet<Id<SecurityGroup>>,
    },
}

/// Whether an update was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Synced {
    /// The program is at this revision, whole.
    At(Rev),
    /// The update does not fit: send everything.
    NeedFull,
}

/// A packet to explain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketQuery {
    /// The port that sends it.
    pub from: Id<Port>,
    /// Source address; the port's own of the same family if `None`.
    pub src: Option<IpAddr>,
    /// Destination address.
    pub dst: IpAddr,
    /// IP protocol number: 1 ICMP, 6 TCP, 17 UDP, 58 ICMPv6.
    pub protocol: u8,
    /// Source port for TCP and UDP.
    pub src_port: u16,
    /// Destination port for TCP and UDP.
    pub dst_port: u16,
}

/// Why a packet arrives or not, stage by stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// The program's revision.
    pub program: Rev,
    /// Each stage in order, up to the one that decided.
    pub stages: Vec<TraceStage>,
    /// The end.
    pub verdict: Verdict,
}

/// One stage of a trace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceStage {
    /// The stage's name, as its file is called.
    pub stage: String,
    /// Whether the packet went on.
    pub passed: bool,
    /// Why: the rule or route that matched.
    pub because: String,
    /// The object whose rule it was.
    pub by: Option<ObjectRef>,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// It reaches that port.
    Delivered(Id<Port>),
    /// The pipeline answers it itself.
    Answered,
    /// It is dropped.
    Dropped,
}

/// Holds the whole program of one fabric.
///
/// # Contract
/// The clauses of [`Provider`], and:
/// 1. `sync-atomic`: packets see the old program or the new one, never a part or none.
/// 2. `sync-full-replaces`: an update with `from: None` leaves just the objects that it puts.
/// 3. `sync-mismatch-needs-full`: an update whose `from` is not the current revision changes nothing and answers
///    `NeedFull`; one whose `to` is older answers `Conflict`.
/// 4. `sync-survives-reopen`: the program is kept over a restart of the provider.
/// 5. `bad-program-refused`: a program with dangling references or overlapping subnets of one VPC fails with `Invalid`, and
///    the old one stays.
/// 6. `explain-agrees`: the verdict of [`explain`](Self::explain) is what the data plane does with that packet as the first
///    of its flow.
/// 7. `isolation`: no packet passes between ports of different VPCs.
/// 8. `antispoof`: a packet whose source is not the port's own is dropped.
///
/// Prove yours with `testing::conformance::net_program` (feature `conformance`).
#[async_trait]
pub trait NetProgram: Provider {
    /// Takes an update, whole or not at all.
    async fn sync(&self, cx: &Ctx, up: &NetUpdate) -> Result<Synced>;

    /// Says what the program does with a packet, and why.
    async fn explain(&self, cx: &Ctx, query: &PacketQuery) -> Result<Trace>;
}

/// Plugs ports in on one host.
///
/// # Contract
/// The clauses of [`Provider`] and of [`Converge<Plug>`], and:
/// 1. `target-when-settled`: a settled plug has a target whose id is the port's and whose term is the spec's.
/// 2. `unknown-port-drops`: a plug whose port the program does not know drops every frame; `program` is zero.
/// 3. `usage-counts-bytes`: `usage` gives `rx-bytes`, `tx-bytes`, `rx-packets` and `tx-packets` of each port, as the guest
///    counts them, whole Ethernet frames without the vnet header.
///
/// Prove yours with `testing::conformance::plugs` (feature `conformance`).
pub trait Plugs: Converge<Plug> {}
