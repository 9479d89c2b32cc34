//! Validated values: names, labels, sizes, addresses, ranges and digests. A wrong one cannot exist.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::Deserialize;
use serde::Serialize;
use sha2::Digest as _;
use sha2::Sha256;

use crate::Error;
use crate::Result;

/// The name of a resource: 1–63 characters of `a-z`, `0-9`, `-` and `.`, beginning and ending with a letter or digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// Checks `text` and makes it a name.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) if it breaks a rule of the type.
    pub fn new(text: impl Into<String>) -> Result<Self> {
        let text = text.into();
        let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
        let good = text.len() <= 63
            && text.chars().all(inner)
            && edge(text.chars().next())
            && edge(text.chars().next_back());
        if good {
            return Ok(Self(text));
        }
        Err(Error::invalid(format!("`{}` is not a name", clip(&text)))
            .remedy("use 1 to 63 of a-z, 0-9, `-` and `.`, with a letter or digit at both ends"))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Up to 64 pairs of key (as a [`Name`], also with `/` and `_`, up to 63 characters) and value (up to 255 bytes).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, String>", into = "BTreeMap<String, String>")]
pub struct Labels(BTreeMap<String, String>);

impl Labels {
    /// Checks the pairs.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) names the pair that breaks a rule of the type.
    pub fn new<K: Into<String>, V: Into<String>>(pairs: impl IntoIterator<Item = (K, V)>) -> Result<Self> {
        pairs.into_iter().map(|(k, v)| (k.into(), v.into())).collect::<BTreeMap<_, _>>().try_into()
    }

    /// The value of `key`.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// The pairs in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }
}

impl TryFrom<BTreeMap<String, String>> for Labels {
    type Error = Error;

    fn try_from(pairs: BTreeMap<String, String>) -> Result<Self> {
        if pairs.len() > 64 {
            return Err(Error::invalid("more than 64 labels").remedy("remove some"));
        }
        for (key, value) in &pairs {
            let plain = key.replace(['/', '_'], "-");
            let value_good = value.len() <= 255 && !value.chars().any(char::is_control);
            if Name::new(plain).is_err() || !value_good {
                return Err(Error::invalid(format!("`{}` is not a label", clip(key)))
                    .remedy("a key is like a name, also with `/` and `_`; a value has at most 255 bytes"));
            }
        }
        Ok(Self(pairs))
    }
}

impl From<Labels> for BTreeMap<String, String> {
    fn from(labels: Labels) -> Self {
        labels.0
    }
}

/// A size in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// `n` mebibytes.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// `n` gibibytes.
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n if n != 0 && n.is_multiple_of(1 << 30) => write!(f, "{} GiB", n >> 30),
            n if n != 0 && n.is_multiple_of(1 << 20) => write!(f, "{} MiB", n >> 20),
            n => write!(f, "{n} B"),
        }
    }
}

/// An IPv4 or IPv6 prefix without host bits.
///
/// # Source
/// RFC 4632 §3.1 (IPv4), RFC 4291 §2.3 (IPv6).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr(IpNet);

impl Cidr {
    /// A prefix of `length` bits.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) if the length is too large or `address` has bits below it.
    pub fn new(address: IpAddr, length: u8) -> Result<Self> {
        let net = IpNet::new(address, length).map_err(|_| {
            Error::invalid(format!("`{address}/{length}` is not a CIDR prefix"))
                .remedy("use a length of at most 32 for IPv4 and 128 for IPv6")
        })?;
        if net.network() != address {
            return Err(
                Error::invalid(format!("`{net}` has host bits")).remedy(format!("write `{}`", net.trunc()))
            );
        }
        Ok(Self(net))
    }

    /// The first address of the prefix.
    pub fn network(self) -> IpAddr {
        self.0.network()
    }

    /// The number of bits of the prefix.
    pub fn length(self) -> u8 {
        self.0.prefix_len()
    }

    /// Whether `address` lies in the prefix; never for the other address family.
    pub fn contains(self, address: IpAddr) -> bool {
        self.0.contains(&address)
    }

    /// Whether the two prefixes share an address.
    pub fn overlaps(self, other: Self) -> bool {
        self.0.contains(&other.0.network()) || other.0.contains(&self.0.network())
    }

    /// Whether this is IPv4.
    pub fn is_ipv4(self) -> bool {
        matches!(self.0, IpNet::V4(_))
    }

    /// The `n`-th address of the prefix, if it has that many.
    pub fn nth(self, n: u64) -> Option<IpAddr> {
        let address = match self.0 {
            IpNet::V4(net) => {
                let n = u32::try_from(n).ok()?;
                IpAddr::V4(Ipv4Addr::from(u32::from(net.network()).checked_add(n)?))
            }
            IpNet::V6(net) => IpAddr::V6(Ipv6Addr::from(u128::from(net.network()).checked_add(n.into())?)),
        };
        self.contains(address).then_some(address)
    }
}

impl FromStr for Cidr {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || {
            Error::invalid(format!("`{}` is not a CIDR prefix", clip(text)))
                .remedy("write an address, a slash and a length, as in `10.0.1.0/24` or `fd00:1::/64`")
        };
        let (address, length) = text.split_once('/').ok_or_else(bad)?;
        Self::new(address.parse().map_err(|_| bad())?, length.parse().map_err(|_| bad())?)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
impl fmt::Debug for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An inclusive range of TCP or UDP ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// Every port.
    pub const ALL: Self = Self { first: 0, last: u16::MAX };

    /// The ports from `first` to `last`, both included.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) if `first` is above `last`.
    pub fn new(first: u16, last: u16) -> Result<Self> {
        if first > last {
            return Err(Error::invalid(format!("port range {first}-{last} is empty"))
                .remedy(format!("write {last}-{first}")));
        }
        Ok(Self { first, last })
    }

    /// Just `port`.
    pub const fn one(port: u16) -> Self {
        Self { first: port, last: port }
    }

    /// Whether `port` is in the range.
    pub const fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }

    /// The first port.
    pub const fn first(self) -> u16 {
        self.first
    }

    /// The last port.
    pub const fn last(self) -> u16 {
        self.last
    }
}

impl FromStr for PortRange {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |t: &str| {
            t.parse::<u16>().map_err(|_| {
                Error::invalid(format!("`{}` is not a port range", clip(text)))
                    .remedy("write one port or two with a dash, 0 to 65535")
            })
        };
        match text.split_once('-') {
            Some((first, last)) => Self::new(number(first)?, number(last)?),
            None => number(text).map(Self::one),
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            return write!(f, "{}", self.first);
        }
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}
impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl FromStr for Mac {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || Error::invalid(format!("`{}` is not an Ethernet address", clip(text)));
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        parts.next().map_or(Ok(Self(bytes)), |_| Err(bad()))
    }
}

/// The SHA-256 of a blob: how kernels, initrds and images are named.
///
/// # Source
/// FIPS 180-4.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}
impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{self}")
    }
}
impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || {
            Error::invalid(format!("`{}` is not a SHA-256 digest", clip(text))).remedy("write 64 hex digits")
        };
        if text.len() != 64 || !text.is_ascii() {
            return Err(bad());
        }
        let mut bytes = [0; 32];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| bad())?;
        }
        Ok(Self(bytes))
    }
}

/// An exact decimal number as text: digits, at most one point, at most 18 digits after it, perhaps a minus sign.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DecimalText(String);

impl DecimalText {
    /// The number as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DecimalText {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let digits = text.strip_prefix('-').unwrap_or(text);
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
        let number =
            |t: &str, most: usize| !t.is_empty() && t.len() <= most && t.bytes().all(|b| b.is_ascii_digit());
        if number(whole, 10) && number(fraction, 18) {
            return Ok(Self(text.to_owned()));
        }
        Err(Error::invalid(format!("`{}` is not a decimal number", clip(text)))
            .remedy("write digits with at most one point, 10 before it and 18 after it"))
    }
}

macro_rules! text_serde {
    ($($name:ty),+) => {$(
        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(text: String) -> Result<Self> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.to_string()
            }
        }
    )+};
}

text_serde!(Name, Cidr, PortRange, Mac, Digest, DecimalText);

impl FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::new(text)
    }
}
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Display for DecimalText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The first 80 characters of a foreign text, so that an error never repeats a megabyte.
fn clip(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn wrong_values_cannot_exist_and_say_what_to_write() {
        for text in ["", "A", "-a", "a-", "a_b", "ä", &"a".repeat(64)] {
            assert!(Name::new(text).is_err(), "{text}");
        }
        let error = "10.0.1.7/24".parse::<Cidr>().unwrap_err();
        assert_eq!(error.to_string(), "`10.0.1.7/24` has host bits; write `10.0.1.0/24`");
        assert!("10.0.0.0/33".parse::<Cidr>().is_err());
        assert!("9-1".parse::<PortRange>().is_err());
        assert!("1.".parse::<DecimalText>().is_err());
        assert!(Labels::new([("Bad Key", "v")]).is_err());
    }

    proptest! {
        #[test]
        fn a_cidr_reads_back_as_it_prints(address: std::net::IpAddr, length in 0u8..=128) {
            let length = if address.is_ipv4() { length % 33 } else { length };
            let net = ipnet::IpNet::new(address, length).unwrap().trunc();
            let cidr = Cidr::new(net.network(), length).unwrap();
            prop_assert_eq!(cidr.to_string().parse::<Cidr>().unwrap(), cidr);
            prop_assert!(cidr.contains(address));
        }

        #[test]
        fn a_port_range_reads_back_as_it_prints(a: u16, b: u16) {
            let range = PortRange::new(a.min(b), a.max(b)).unwrap();
            prop_assert_eq!(range.to_string().parse::<PortRange>().unwrap(), range);
        }

        #[test]
        fn no_text_makes_a_parser_panic(text: String) {
            let _ = (text.parse::<Cidr>(), text.parse::<PortRange>(), text.parse::<Name>());
            let _ = (text.parse::<Mac>(), text.parse::<Digest>(), text.parse::<DecimalText>());
        }
    }
}
