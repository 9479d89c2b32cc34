//! Opens ports of the scheme `ring`: the listener is made before the jail, the ring inside it.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::path::PathBuf;

use bytes::Bytes;
use iaas_core::Error;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::model::Port;
use iaas_core::spi::dataplane::Env;
use iaas_core::spi::dataplane::FramePort;
use iaas_core::spi::dataplane::Grant;
use iaas_core::spi::dataplane::Needs;
use iaas_core::spi::dataplane::Offloads;
use iaas_core::spi::dataplane::PortOpener;
use iaas_core::spi::target::Form;
use iaas_core::spi::target::Target;
use serde::Deserialize;
use serde::Serialize;

use super::ring::RingPort;
use super::socket;

/// The scheme of ring ports.
pub const SCHEME: &str = "ring";
/// The version of its tokens and of the ring's layout.
pub const VERSION: u16 = 1;

/// Opens ring ports.
#[derive(Clone, Copy, Debug, Default)]
pub struct RingOpener;

/// What a ring target says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Token {
    /// Where the runner listens and the switch dials.
    pub(crate) socket: PathBuf,
    #[serde(default)]
    pub(crate) checksum: bool,
    #[serde(default)]
    pub(crate) tso4: bool,
    #[serde(default)]
    pub(crate) tso6: bool,
    #[serde(default)]
    pub(crate) uso: bool,
}

impl Token {
    pub(crate) fn new(socket: PathBuf, agreed: Offloads) -> Self {
        let Offloads { checksum, tso4, tso6, uso } = agreed;
        Self { socket, checksum, tso4, tso6, uso }
    }

    pub(crate) fn form(&self) -> Result<Form> {
        let mut token = Vec::new();
        ciborium::into_writer(self, &mut token)
            .map_err(|e| Error::internal("a port's token could not be written").because(&e))?;
        Ok(Form::Opener { scheme: SCHEME.to_owned(), version: VERSION, token: Bytes::from(token) })
    }

    fn of(target: &Target) -> Result<Self> {
        let token = target.forms.iter().find_map(|form| match form {
            Form::Opener { scheme, version: VERSION, token } if scheme == SCHEME => Some(token),
            _ => None,
        });
        let token = token.ok_or_else(|| Error::unsupported("the port has no form of the scheme `ring`"))?;
        ciborium::from_reader(token.as_ref())
            .map_err(|e| Error::invalid("the port's token cannot be read").because(&e))
    }
}

/// The socket of a port in the folder of sockets: the last 64 bits of its id, which in a UUIDv7 are random.
///
/// # Errors
/// `Invalid` if the path has more than the 107 bytes of a socket's (unix(7)).
pub(crate) fn socket_path(runtime: &Path, port: Id<Port>) -> Result<PathBuf> {
    let (_, low) = port.uuid().as_u64_pair();
    let path = runtime.join(format!("p-{low:016x}.sock"));
    if path.as_os_str().as_bytes().len() > 107 {
        return Err(Error::invalid("the path of the runtime folder is too long for sockets")
            .detail(path.display().to_string())
            .remedy("choose a short one, such as /run/iaas"));
    }
    Ok(path)
}

impl PortOpener for RingOpener {
    fn scheme(&self) -> (&'static str, u16) {
        (SCHEME, VERSION)
    }

    /// Listens where the switch dials. Grants `listener`.
    ///
    /// # Errors
    /// `Unsupported` if the target has no such form; `Unavailable` if the socket cannot be made.
    fn prepare(&self, target: &Target) -> Result<Grant> {
        let token = Token::of(target)?;
        let listener = socket::listen(&token.socket).map_err(|e| {
            Error::unavailable("the socket of a port could not be made")
                .detail(token.socket.display().to_string())
                .because(&e)
        })?;
        let needs = Needs { memory: 2 << 20, ..Needs::default() };
        Ok(Grant { fds: [("listener".to_owned(), listener)].into(), needs, ..Grant::default() })
    }

    fn open(&self, target: &Target, mut grant: Grant, _: &Env) -> Result<Vec<Box<dyn FramePort>>> {
        let Token { checksum, tso4, tso6, uso, .. } = Token::of(target)?;
        let listener = grant.fds.remove("listener").ok_or_else(|| {
            Error::invalid("a ring port needs the descriptor `listener`").remedy("call `prepare` first")
        })?;
        let port = RingPort::new(listener, Offloads { checksum, tso4, tso6, uso })
            .map_err(|e| Error::unavailable("the memory of a port could not be made").because(&e))?;
        Ok(vec![Box::new(port)])
    }
}
