//! A port whose far end is this program: a host that answers ARP and pings.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use iaas_core::Error;
use iaas_core::Mac;
use iaas_core::Result;
use iaas_core::Term;
use iaas_core::spi::dataplane::Env;
use iaas_core::spi::dataplane::FramePort;
use iaas_core::spi::dataplane::Grant;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::dataplane::Offloads;
use iaas_core::spi::dataplane::PortOpener;
use iaas_core::spi::hypervisor::Device;
use iaas_core::spi::target::Form;
use iaas_core::spi::target::Mode;
use iaas_core::spi::target::Target;
use uuid::Uuid;

const SCHEME: &str = "cable";
const HEADER: usize = 12;
/// The far ends of the cables that were made in this process.
static FAR: Mutex<Vec<UnixDatagram>> = Mutex::new(Vec::new());
/// How many cables were made in this process.
static MADE: AtomicU64 = AtomicU64::new(0);

#[derive(Debug)]
pub(crate) struct Cable;

impl PortOpener for Cable {
    fn scheme(&self) -> (&'static str, u16) {
        (SCHEME, 1)
    }

    fn prepare(&self, _: &Target) -> Result<Grant> {
        let (near, far) = UnixDatagram::pair().map_err(|e| Error::unavailable("no cable").because(&e))?;
        FAR.lock().unwrap().push(far);
        MADE.fetch_add(1, Ordering::Relaxed);
        let mut grant = Grant::default();
        grant.fds.insert("near".into(), near.into());
        Ok(grant)
    }

    fn open(&self, _: &Target, mut grant: Grant, _: &Env) -> Result<Vec<Box<dyn FramePort>>> {
        let near = grant.fds.remove("near").ok_or_else(|| Error::internal("no descriptor"))?;
        let near = UnixDatagram::from(near);
        near.set_nonblocking(true).map_err(|e| Error::unavailable("no cable").because(&e))?;
        Ok(vec![Box::new(Near(near))])
    }
}

#[derive(Debug)]
struct Near(UnixDatagram);

impl FramePort for Near {
    fn offloads(&mut self, _: Offloads) -> Offloads {
        Offloads::default()
    }

    fn recv(&mut self, into: &mut [IoBuffers], lens: &mut [u32]) -> io::Result<usize> {
        let mut bytes = [0; 4096];
        let count = self.0.recv(&mut bytes)?;
        into[0].write_at(0, &bytes[..count]);
        lens[0] = u32::try_from(count).unwrap_or(0);
        Ok(1)
    }

    fn send(&mut self, frames: &[IoBuffers]) -> io::Result<usize> {
        let mut bytes = vec![0; frames[0].len()];
        frames[0].read_at(0, &mut bytes);
        self.0.send(&bytes)?;
        Ok(1)
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// How many cables were made so far.
#[allow(dead_code, reason = "only one of the programs asks")]
pub(crate) fn cables() -> u64 {
    MADE.load(Ordering::Relaxed)
}

pub(crate) fn nic(id: u128) -> (Uuid, Device) {
    let form = Form::Opener { scheme: SCHEME.into(), version: 1, token: Bytes::new() };
    let target =
        Target { id: Uuid::from_u128(id), term: Term(1), mode: Mode::Write, forms: vec![form], key: None };
    (Uuid::from_u128(id + 1000), Device::Nic { target, mac: Mac([2, 0, 0, 0, 0, 6]) })
}

/// 10.0.0.1 at the far end of every cable.
pub(crate) struct Peer(Arc<AtomicU64>);

impl Peer {
    pub(crate) fn answer() -> Self {
        let pings = Arc::new(AtomicU64::new(0));
        let count = pings.clone();
        std::thread::spawn(move || {
            loop {
                let cables: Vec<UnixDatagram> = FAR.lock().unwrap().drain(..).collect();
                for cable in cables {
                    let count = count.clone();
                    std::thread::spawn(move || serve(&cable, &count));
                }
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        });
        Self(pings)
    }

    pub(crate) fn pings(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

fn serve(cable: &UnixDatagram, pings: &AtomicU64) {
    let mut bytes = [0; 4096];
    while let Ok(count) = cable.recv(&mut bytes) {
        let Some(reply) = reply(&bytes[HEADER..count], pings) else { continue };
        let _ = cable.send(&[vec![0; HEADER], reply].concat());
    }
}

const US: [u8; 6] = [2, 0, 0, 0, 0, 1];
const ADDRESS: [u8; 4] = [10, 0, 0, 1];

fn reply(frame: &[u8], pings: &AtomicU64) -> Option<Vec<u8>> {
    let mut out = frame.to_vec();
    out.get_mut(..6)?.copy_from_slice(&frame[6..12]);
    out.get_mut(6..12)?.copy_from_slice(&US);
    match frame.get(12..14)? {
        // RFC 826: a request for our address becomes the reply.
        [8, 6] if frame.get(20..22)? == [0, 1] && frame.get(38..42)? == ADDRESS => {
            out[21] = 2;
            out[22..28].copy_from_slice(&US);
            out[28..32].copy_from_slice(&ADDRESS);
            out[32..42].copy_from_slice(&frame[22..32]);
            Some(out)
        }
        // RFC 792: type 8 becomes type 0, which raises the checksum by 0x0800.
        [8, 0] if frame.get(23)? == &1 && frame.get(34)? == &8 && frame.get(30..34)? == ADDRESS => {
            pings.fetch_add(1, Ordering::Relaxed);
            out[26..30].copy_from_slice(&ADDRESS);
            out[30..34].copy_from_slice(&frame[26..30]);
            out[34] = 0;
            let sum = u32::from(u16::from_be_bytes([frame[36], frame[37]])) + 0x0800;
            let sum = u16::try_from((sum & 0xffff) + (sum >> 16)).ok()?;
            out[36..38].copy_from_slice(&sum.to_be_bytes());
            Some(out)
        }
        _ => None,
    }
}
