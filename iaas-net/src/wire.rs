//! Bytes of headers: reading, writing, Internet checksums.

use iaas_core::Mac;
use iaas_core::spi::dataplane::frame::VNET_HEADER;

/// Bytes of an Ethernet header without a VLAN tag.
pub(crate) const ETHERNET: usize = 14;
/// EtherType of IPv4.
pub(crate) const IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub(crate) const ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub(crate) const IPV6: u16 = 0x86dd;
/// The broadcast Ethernet address.
pub(crate) const BROADCAST: Mac = Mac([0xff; 6]);

/// IP protocol numbers.
///
/// # Source
/// IANA "Assigned Internet Protocol Numbers".
pub(crate) mod protocol {
    pub(crate) const ICMP: u8 = 1;
    pub(crate) const TCP: u8 = 6;
    pub(crate) const UDP: u8 = 17;
    pub(crate) const ICMPV6: u8 = 58;
}

/// `N` bytes from `at`.
pub(crate) fn take<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk::<N>().copied()
}

/// The 16-bit number at `at`, most significant byte first.
pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    take(bytes, at).map(u16::from_be_bytes)
}

/// Writes `value` at `at`; nothing if it does not fit.
pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

/// Begins a frame: an empty virtio-net header and an Ethernet header.
pub(crate) fn begin(out: &mut Vec<u8>, to: Mac, from: Mac, ethertype: u16) {
    out.clear();
    out.extend_from_slice(&[0; VNET_HEADER]);
    out.extend_from_slice(&to.0);
    out.extend_from_slice(&from.0);
    out.extend_from_slice(&ethertype.to_be_bytes());
}

/// Appends an IPv4 header for `payload` bytes.
///
/// # Source
/// RFC 791 §3.1.
pub(crate) fn ipv4(out: &mut Vec<u8>, protocol: u8, from: [u8; 4], to: [u8; 4], payload: usize) {
    let at = out.len();
    let total = u16::try_from(payload + 20).unwrap_or(u16::MAX);
    out.extend_from_slice(&[0x45, 0]);
    out.extend_from_slice(&total.to_be_bytes());
    // Identification 0 and "don't fragment": RFC 6864 §4.1 allows it for packets that are never fragmented.
    out.extend_from_slice(&[0, 0, 0x40, 0, 64, protocol, 0, 0]);
    out.extend_from_slice(&from);
    out.extend_from_slice(&to);
    let sum = checksum(0, out.get(at..).unwrap_or_default());
    put(out, at + 10, &sum.to_be_bytes());
}

/// Appends an IPv6 header for `payload` bytes.
///
/// # Source
/// RFC 8200 §3.
pub(crate) fn ipv6(out: &mut Vec<u8>, next: u8, hops: u8, from: u128, to: u128, payload: usize) {
    let length = u16::try_from(payload).unwrap_or(u16::MAX);
    out.extend_from_slice(&[0x60, 0, 0, 0]);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(&[next, hops]);
    out.extend_from_slice(&from.to_be_bytes());
    out.extend_from_slice(&to.to_be_bytes());
}

/// The Internet checksum of `bytes` on top of the unfolded sum `start`.
///
/// # Source
/// RFC 1071 §4.1.
pub(crate) fn checksum(start: u64, bytes: &[u8]) -> u16 {
    let mut sum = start + partial(bytes);
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// The unfolded sum of 16-bit words; an odd last byte counts as the high one.
pub(crate) fn partial(bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(2);
    let odd = words.remainder().first().map_or(0, |b| u64::from(*b) << 8);
    words.map(|w| u64::from(u16::from_be_bytes([w[0], w[1]]))).sum::<u64>() + odd
}

/// The unfolded sum of the pseudo-header: both addresses, protocol and length of what follows.
///
/// # Source
/// RFC 9293 §3.1 (IPv4), RFC 8200 §8.1 (IPv6).
pub(crate) fn pseudo(from: &[u8], to: &[u8], protocol: u8, length: usize) -> u64 {
    partial(from) + partial(to) + u64::from(protocol) + length as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_the_rfc_example() {
        // RFC 1071 §3: the sum of these words is ddf2.
        assert_eq!(checksum(0, &[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }
}
