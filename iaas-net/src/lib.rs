//! The packet engine of the IaaS SDK: VPCs, subnets and security groups for the VMs of a host.
//!
//! ```
//! use iaas_core::{Cidr, Id, Mac, Result, Rev};
//! use iaas_core::spi::network::{NetObject, PacketQuery, Verdict};
//! use iaas_net::{Topology, pipeline};
//! use uuid::Uuid;
//!
//! # fn main() -> Result<()> {
//! let (vpc, subnet) = (Id::from_uuid(Uuid::now_v7()), Id::from_uuid(Uuid::now_v7()));
//! let (web, db) = (Id::from_uuid(Uuid::now_v7()), Id::from_uuid(Uuid::now_v7()));
//! let cidrs = vec!["10.0.1.0/24".parse::<Cidr>()?];
//! let port = |id, n: u8| NetObject::Port {
//!     id,
//!     subnet,
//!     mac: Mac([2, 0, 0, 0, 0, n]),
//!     addrs: vec![[10, 0, 1, n].into()],
//!     groups: Default::default(),
//! };
//! let program = Topology::new([
//!     NetObject::Network { id: vpc, vni: 7, mtu: 1500 },
//!     NetObject::Subnet { id: subnet, network: vpc, cidrs, dns: vec![] },
//!     port(web, 10),
//!     port(db, 11),
//! ])?
//! .compile(Rev(1))?;
//!
//! let question =
//!     PacketQuery { from: web, src: None, dst: [10, 0, 1, 11].into(), protocol: 6, src_port: 40_000, dst_port: 5432 };
//! let trace = pipeline::explain(&program, &question)?;
//! assert_eq!(trace.verdict, Verdict::Delivered(db));
//! # Ok(()) }
//! ```
//!
//! # Core concepts
//! * [`Topology`] → [`Program`]: the objects of a fabric, checked against each other and compiled, whole or not at all. A
//!   program never changes and is shared by `Arc`.
//! * [`Pipeline`]: frames and a time in, verdicts out; no I/O inside, one per thread. The first packet of a flow walks the
//!   stages (one file each), the others cost one look-up and no allocation. [`pipeline::explain`] walks the same stages.
//! * The services of a subnet's router are answered in the pipeline: ARP, neighbour discovery, DHCPv4, router advertisements,
//!   ICMP echo. There is no daemon, and nothing is flooded.
//! * [`port`]: a ring in shared memory between a VM's runner and the switch, and a cable in memory.
//! * [`switch`]: one process per host, the role [`SwitchRole`]. It maps rings, never a guest's RAM, and copies each frame in
//!   and out. It may be killed at any moment: frames wait in the rings, and established flows are found again.
//! * [`HostNetwork`]: the provider. What it accepts is on disk; the switch is told to look, and started again when it dies.
//!
//! # What a port may send
//! Only from its own Ethernet and IP addresses and its link-local address; hosts are expected to form their IPv6 address by
//! SLAAC, so the control plane gives a port the address that its MAC forms ([`topology::slaac`]). Fragments, VLAN tags, IPv4
//! options and IPv6 extension headers are dropped, each with a reason that is counted.
//!
//! # What it does not do yet
//! Route tables, NAT, load balancing, peering, several hosts in one fabric (VXLAN), TAP and vhost-user ports, more than one
//! pair of queues, segmentation: a port takes super-frames only if all ports of the host do.

mod folder;
pub mod pipeline;
pub mod port;
mod program;
mod provider;
mod service;
pub mod switch;
mod sys;
pub mod testing;
pub mod topology;
mod wire;

pub use pipeline::Pipeline;
pub use port::RingOpener;
pub use program::Program;
pub use provider::HostNetwork;
pub use provider::Settings;
pub use switch::role::SwitchRole;
pub use topology::ROUTER_MAC;
pub use topology::Topology;
