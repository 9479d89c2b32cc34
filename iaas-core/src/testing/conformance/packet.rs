//! A guest of a few lines: it sends IPv4 packets through a port, answers ARP, and says what arrived.

use std::net::Ipv4Addr;
use std::time::Duration;

use super::calls::Patience;
use crate::Mac;
use crate::spi::dataplane::FramePort;
use crate::spi::dataplane::IoBuffers;
use crate::spi::dataplane::frame::VNET_HEADER;

const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const BROADCAST: Mac = Mac([0xff; 6]);

/// The guest's side of a port.
#[derive(Debug)]
pub(crate) struct Guest {
    port: Box<dyn FramePort>,
    pub(crate) mac: Mac,
    pub(crate) addr: Ipv4Addr,
    /// The first address of its subnet, and whom it can reach without it.
    pub(crate) gateway: Ipv4Addr,
    pub(crate) neighbours: Vec<Ipv4Addr>,
    pub(crate) received: Vec<Vec<u8>>,
    /// Frames and bytes, as the guest counts them.
    pub(crate) tx: (u64, u64),
    pub(crate) rx: (u64, u64),
}

/// A packet to send.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet {
    pub(crate) src: Ipv4Addr,
    pub(crate) dst: Ipv4Addr,
    pub(crate) protocol: u8,
    pub(crate) ports: (u16, u16),
    pub(crate) nonce: u64,
}

impl Guest {
    pub(crate) fn new(port: Box<dyn FramePort>, mac: Mac, addr: Ipv4Addr, gateway: Ipv4Addr) -> Self {
        Self {
            port,
            mac,
            addr,
            gateway,
            neighbours: Vec::new(),
            received: Vec::new(),
            tx: (0, 0),
            rx: (0, 0),
        }
    }

    /// Sends a frame without a header.
    pub(crate) fn send(&mut self, frame: &[u8]) -> Result<(), String> {
        let mut bytes = vec![0; VNET_HEADER];
        bytes.extend_from_slice(frame);
        let buffers = [IoBuffers::copied(&bytes)];
        let sent = self.port.send(&buffers).map_err(|e| format!("send: {e}"))?;
        if sent != 1 {
            return Err("a port took no frame".to_owned());
        }
        self.tx = (self.tx.0 + 1, self.tx.1 + frame.len() as u64);
        Ok(())
    }

    /// Takes what has arrived and answers ARP requests for its own address.
    pub(crate) fn poll(&mut self) -> Result<(), String> {
        loop {
            let mut buffers = [IoBuffers::zeroed(2048)];
            let mut lens = [0u32];
            match self.port.recv(&mut buffers, &mut lens) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(format!("recv: {e}")),
            }
            let len = usize::try_from(lens[0]).unwrap_or(0);
            let mut frame = vec![0; len.saturating_sub(VNET_HEADER)];
            buffers[0].read_at(VNET_HEADER, &mut frame);
            self.rx = (self.rx.0 + 1, self.rx.1 + frame.len() as u64);
            if asks_for(&frame, self.addr) {
                let reply = arp(2, self.mac, self.addr, &frame);
                self.send(&reply)?;
            }
            self.received.push(frame);
        }
    }

    /// The Ethernet address by which `dst` is reached; `None` if nobody says.
    pub(crate) async fn resolve(
        &mut self,
        dst: Ipv4Addr,
        others: &mut [&mut Guest],
        within: Duration,
    ) -> Result<Option<Mac>, String> {
        let next = if self.neighbours.contains(&dst) { dst } else { self.gateway };
        let request = arp_request(self.mac, self.addr, next);
        self.send(&request)?;
        let patience = Patience::new(within);
        loop {
            self.poll()?;
            for other in &mut *others {
                other.poll()?;
            }
            let found = self.received.iter().rev().find_map(|f| answer(f, next));
            if found.is_some() || patience.wait(String::new).await.is_err() {
                return Ok(found);
            }
        }
    }

    /// Sends a packet to the Ethernet address `to`.
    pub(crate) fn send_packet(&mut self, to: Mac, packet: &Packet) -> Result<(), String> {
        let mut frame = Vec::new();
        frame.extend_from_slice(&to.0);
        frame.extend_from_slice(&self.mac.0);
        frame.extend_from_slice(&IPV4.to_be_bytes());
        frame.extend_from_slice(&packet.bytes());
        self.send(&frame)
    }

    /// Whether a packet with that nonce has arrived.
    pub(crate) fn has(&self, nonce: u64) -> bool {
        let nonce = nonce.to_be_bytes();
        let ip = |f: &&Vec<u8>| f.get(12..14) == Some(&IPV4.to_be_bytes());
        self.received.iter().filter(ip).any(|f| f.windows(8).any(|w| w == nonce))
    }
}

impl Packet {
    /// The IPv4 packet, with right checksums: RFC 791 §3.1, RFC 768, RFC 9293 §3.1, RFC 792.
    fn bytes(&self) -> Vec<u8> {
        let payload = self.payload();
        let total = u16::try_from(20 + payload.len()).unwrap_or(u16::MAX);
        let mut ip = vec![0x45, 0];
        ip.extend_from_slice(&total.to_be_bytes());
        ip.extend_from_slice(&[0, 1, 0x40, 0, 64, self.protocol, 0, 0]);
        ip.extend_from_slice(&self.src.octets());
        ip.extend_from_slice(&self.dst.octets());
        let sum = checksum(&ip).to_be_bytes();
        ip[10..12].copy_from_slice(&sum);
        ip.extend_from_slice(&payload);
        ip
    }

    fn payload(&self) -> Vec<u8> {
        let nonce = self.nonce.to_be_bytes();
        let mut bytes: Vec<u8> = Vec::new();
        let at = match self.protocol {
            // An echo request.
            1 => {
                bytes.extend_from_slice(&[8, 0, 0, 0, 0, 7, 0, 1]);
                2
            }
            // A SYN.
            6 => {
                bytes.extend_from_slice(&self.ports.0.to_be_bytes());
                bytes.extend_from_slice(&self.ports.1.to_be_bytes());
                bytes.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
                16
            }
            _ => {
                bytes.extend_from_slice(&self.ports.0.to_be_bytes());
                bytes.extend_from_slice(&self.ports.1.to_be_bytes());
                bytes.extend_from_slice(&[0, 16, 0, 0]);
                6
            }
        };
        bytes.extend_from_slice(&nonce);
        let mut summed = Vec::new();
        if self.protocol != 1 {
            summed.extend_from_slice(&self.src.octets());
            summed.extend_from_slice(&self.dst.octets());
            summed.extend_from_slice(&[0, self.protocol]);
            summed.extend_from_slice(&u16::try_from(bytes.len()).unwrap_or(0).to_be_bytes());
        }
        summed.extend_from_slice(&bytes);
        let sum = checksum(&summed).to_be_bytes();
        bytes[at..at + 2].copy_from_slice(&sum);
        bytes
    }
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// RFC 826, with the asked address of `request` as the target.
fn arp(operation: u16, mac: Mac, addr: Ipv4Addr, request: &[u8]) -> Vec<u8> {
    let mut frame = request.get(6..12).unwrap_or(&BROADCAST.0).to_vec();
    frame.extend_from_slice(&mac.0);
    frame.extend_from_slice(&ARP.to_be_bytes());
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4]);
    frame.extend_from_slice(&operation.to_be_bytes());
    frame.extend_from_slice(&mac.0);
    frame.extend_from_slice(&addr.octets());
    frame.extend_from_slice(request.get(22..32).unwrap_or(&[0; 10]));
    frame
}

fn arp_request(mac: Mac, addr: Ipv4Addr, wanted: Ipv4Addr) -> Vec<u8> {
    let mut frame = arp(1, mac, addr, &[]);
    frame.truncate(32);
    frame.extend_from_slice(&[0; 6]);
    frame.extend_from_slice(&wanted.octets());
    frame
}

/// Whether the frame is an ARP request for `addr`.
fn asks_for(frame: &[u8], addr: Ipv4Addr) -> bool {
    frame.get(12..14) == Some(&ARP.to_be_bytes())
        && frame.get(20..22) == Some(&[0, 1])
        && frame.get(38..42) == Some(&addr.octets())
}

/// The address in an ARP reply of `addr`.
fn answer(frame: &[u8], addr: Ipv4Addr) -> Option<Mac> {
    let reply = frame.get(12..14) == Some(&ARP.to_be_bytes()) && frame.get(20..22) == Some(&[0, 2]);
    let from = frame.get(28..32) == Some(&addr.octets());
    (reply && from).then(|| frame.get(22..28)?.try_into().ok().map(Mac))?
}
