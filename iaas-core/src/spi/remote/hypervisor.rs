//! [`Hypervisor`] over the wire.

use async_trait::async_trait;
use serde::Deserialize;
use serde::Serialize;

use super::Part;
use super::client::RemotePart;
use super::client::stream_ask;
use super::frame::Ask;
use super::frame::decode;
use super::server::Answer;
use super::server::converge;
use super::server::need;
use super::server::no_verb;
use super::stream;
use super::stream::RemoteBytes;
use crate::Id;
use crate::Result;
use crate::spi::ByteStream;
use crate::spi::Converge;
use crate::spi::Ctx;
use crate::spi::hypervisor::Handover;
use crate::spi::hypervisor::Hypervisor;
use crate::spi::hypervisor::Vm;
use crate::spi::hypervisor::VmImage;

#[derive(Debug, Serialize, Deserialize)]
struct ConsoleArgs {
    vm: Id<Vm>,
    from: u64,
}

#[async_trait]
impl Hypervisor for RemotePart {
    fn images(&self) -> Option<&dyn Converge<VmImage>> {
        self.first.as_deref().map(|part| part as _)
    }

    fn handovers(&self) -> Option<&dyn Converge<Handover>> {
        self.second.as_deref().map(|part| part as _)
    }

    async fn console(&self, cx: &Ctx, vm: Id<Vm>, from: u64) -> Result<Box<dyn ByteStream>> {
        self.open_stream("console", cx, &ConsoleArgs { vm, from }).await
    }
}

impl RemotePart {
    /// Calls a verb that opens a byte stream.
    pub(super) async fn open_stream(
        &self,
        verb: &str,
        cx: &Ctx,
        args: &impl Serialize,
    ) -> Result<Box<dyn ByteStream>> {
        let link = self.client.link().await?;
        let mut ask = stream_ask(self.part, verb, args)?;
        ask.call = Some(cx.call.clone());
        let stream = decode(&link.ask(ask, Some(cx)).await?)?;
        Ok(Box::new(RemoteBytes::new(link, self.part, stream)))
    }
}

pub(super) async fn answer(hypervisor: &dyn Hypervisor, ask: &Ask, cx: Option<&Ctx>) -> Result<Answer> {
    match (ask.part, ask.verb.as_str()) {
        (Part::Images, _) => converge(hypervisor.images().ok_or_else(|| no_verb(ask))?, ask, cx).await,
        (Part::Handovers, _) => converge(hypervisor.handovers().ok_or_else(|| no_verb(ask))?, ask, cx).await,
        (_, "console") => {
            let ConsoleArgs { vm, from } = decode(&ask.args)?;
            let console = hypervisor.console(need(cx)?, vm, from).await?;
            Ok(Answer::Stream(stream::Served::Bytes(console)))
        }
        _ => converge::<Vm>(hypervisor, ask, cx).await,
    }
}
