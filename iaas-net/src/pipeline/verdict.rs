//! What becomes of a frame, and why it is dropped.

use super::Slot;

/// What the caller does with a frame after [`Pipeline::process`](super::Pipeline::process).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Hand the frame, as it is now, to that port.
    Deliver(Slot),
    /// The frame was replaced by the answer to it: hand it back to the port that it came from.
    Reply,
    /// The pipeline took note of the frame; there is nothing to send.
    Absorb,
    /// Throw it away. Already counted.
    Drop(Reason),
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident => $text:literal),+ $(,)?) => {
        /// Why a frame is dropped.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason {$(
            $(#[$doc])*
            $name,
        )+}

        impl Reason {
            /// Every reason, in the order of its number.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The reason in words.
            pub fn text(self) -> &'static str {
                match self {$( Self::$name => $text, )+}
            }
        }
    };
}

reasons! {
    /// The frame came from a port that the program does not know.
    UnknownPort => "the program does not know the sending port",
    /// A header is cut short or contradicts itself.
    Malformed => "a header is cut short or contradicts itself",
    /// The virtio-net header asks for an offload that was not agreed on.
    Offload => "the virtio-net header is wrong or asks for an offload that was not agreed on",
    /// A VLAN tag.
    Vlan => "frames with VLAN tags are not forwarded",
    /// Neither IP nor ARP.
    EtherType => "only IPv4, IPv6 and ARP are forwarded",
    /// An IP fragment.
    Fragment => "IP fragments are not forwarded",
    /// An IPv4 header with options or an IPv6 extension header.
    HeaderOptions => "IP options and extension headers are not forwarded",
    /// The source Ethernet address is not the port's.
    SpoofedMac => "the source Ethernet address is not the port's own",
    /// The source IP address is not the port's.
    SpoofedAddress => "the source IP address is not the port's own",
    /// Broadcast or multicast that no service answers.
    Multicast => "broadcast and multicast are answered or dropped, never flooded",
    /// A router advertisement or redirect from a port.
    RogueRouter => "ports may not act as routers",
    /// A question about something that is not there.
    NoAnswer => "there is nothing to answer the question with",
    /// A packet to the router that it does not serve.
    RouterClosed => "the router answers only ICMP echo and DHCP",
    /// No port of the VPC has the destination address.
    NoRoute => "no other port of the network has the destination address",
    /// The destination Ethernet address is neither the router's nor that of the port that has the destination address.
    WrongNextHop => "the destination Ethernet address is not the next hop's",
    /// The hop limit ran out.
    HopLimit => "the hop limit ran out",
    /// Larger than the network's MTU.
    TooBig => "the packet is larger than the network's MTU",
    /// No rule of the sender's groups allows it.
    Egress => "no egress rule of the sender's security groups allows it",
    /// No rule of the receiver's groups allows it.
    Ingress => "no ingress rule of the receiver's security groups allows it",
    /// The port that opened the flow has too many.
    FlowLimit => "the port has too many open flows",
    /// The destination port is not plugged in on this host.
    NotHere => "the destination port is not plugged in on this host",
}

/// How often each reason dropped a frame.
#[derive(Clone, Debug)]
pub struct Drops([u64; Reason::ALL.len()]);

impl Drops {
    pub(crate) fn count(&mut self, reason: Reason) {
        // A reason's number is its place in `ALL`, whose length is the array's.
        self.0[reason as usize] += 1;
    }

    /// Frames dropped for `reason`.
    pub fn of(&self, reason: Reason) -> u64 {
        self.0[reason as usize]
    }
}

impl Default for Drops {
    fn default() -> Self {
        Self([0; Reason::ALL.len()])
    }
}
