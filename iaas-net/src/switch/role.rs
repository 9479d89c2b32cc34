//! The role `switch`: a [`Switch`] on the main thread of a process of its own, and control's calls on another.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;
use std::sync::mpsc::Sender;

use bytes::Bytes;
use iaas_core::Error;
use iaas_core::Result;
use iaas_core::process::Reply;
use iaas_core::process::Request;
use iaas_core::process::Responder;
use iaas_core::process::Role;
use iaas_core::process::RoleStart;
use iaas_core::process::Roles;
use iaas_core::spi::dataplane::Offloads;
use serde::Deserialize;
use serde::Serialize;
use uuid::Uuid;

use super::Command;
use super::Switch;
use crate::pipeline::Limits;

/// The name of the role.
pub const ROLE: &str = "switch";

/// The role that a program gives to [`iaas_core::process::init`].
#[derive(Clone, Copy, Debug, Default)]
pub struct SwitchRole;

/// What the provider starts it with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Args {
    pub(crate) folder: PathBuf,
    #[serde(default)]
    pub(crate) checksum: bool,
    #[serde(default)]
    pub(crate) tso4: bool,
    #[serde(default)]
    pub(crate) tso6: bool,
    #[serde(default)]
    pub(crate) uso: bool,
}

impl Role for SwitchRole {
    fn name(&self) -> &'static str {
        ROLE
    }

    fn main(&self, start: RoleStart, _: &Roles) -> ExitCode {
        match run(start) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                eprintln!("the switch ended: {e:#}");
                ExitCode::FAILURE
            }
        }
    }
}

fn run(start: RoleStart) -> Result<()> {
    let args: Args = ciborium::from_reader(start.args.as_ref())
        .map_err(|e| Error::invalid("the switch cannot read its arguments").because(&e))?;
    let agreed = Offloads { checksum: args.checksum, tso4: args.tso4, tso6: args.tso6, uso: args.uso };
    let (seed, _) = Uuid::new_v4().as_u64_pair();
    let mut switch = Switch::new(args.folder, agreed, Limits::default(), seed)?;
    let (commands, inbox) = mpsc::channel();
    let (server, waker) = (start.server, switch.waker());
    let calls = std::thread::Builder::new().name("control".to_owned()).spawn(move || {
        let ended = server.serve_deferred(|request, responder| {
            answer(&commands, request, responder);
            waker.wake();
        });
        if let Err(e) = ended {
            eprintln!("the switch no longer hears control: {e:#}");
        }
        // `commands` ends here, and so does the switch: its owner starts another.
        drop(commands);
        waker.wake();
    });
    calls.map_err(|e| Error::unavailable("the switch could not start a thread").because(&e))?;
    switch.run(&inbox)
}

/// Has the switch's thread do what control asks.
fn answer(commands: &Sender<Command>, request: Request, responder: Responder) {
    let command: Command = match request.verb.as_str() {
        "reload" => Box::new(move |switch| {
            let reloaded = switch.reload();
            responder.answer(reloaded.and_then(|()| encode(switch)));
        }),
        "status" => Box::new(move |switch| responder.answer(encode(switch))),
        verb => {
            let unknown = Error::unsupported(format!("the switch does not know `{verb}`"));
            return responder.answer::<Reply>(Err(unknown));
        }
    };
    // If the switch's thread is gone, dropping the responder answers.
    let _ = commands.send(command);
}

fn encode(switch: &Switch) -> Result<Bytes> {
    let mut body = Vec::new();
    ciborium::into_writer(&switch.status(), &mut body)
        .map_err(|e| Error::internal("the switch's status could not be encoded").because(&e))?;
    Ok(body.into())
}
