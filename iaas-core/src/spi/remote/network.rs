//! [`NetProgram`] and [`Plugs`] over the wire.

use async_trait::async_trait;

use super::client::RemotePart;
use super::frame::Ask;
use super::frame::decode;
use super::server::Answer;
use super::server::need;
use super::server::provider;
use crate::Result;
use crate::spi::Ctx;
use crate::spi::network::NetProgram;
use crate::spi::network::NetUpdate;
use crate::spi::network::PacketQuery;
use crate::spi::network::Plugs;
use crate::spi::network::Synced;
use crate::spi::network::Trace;

#[async_trait]
impl NetProgram for RemotePart {
    async fn sync(&self, cx: &Ctx, up: &NetUpdate) -> Result<Synced> {
        self.call("sync", cx, up).await
    }

    async fn explain(&self, cx: &Ctx, query: &PacketQuery) -> Result<Trace> {
        self.call("explain", cx, query).await
    }
}

impl Plugs for RemotePart {}

pub(super) async fn answer_net(net: &dyn NetProgram, ask: &Ask, cx: Option<&Ctx>) -> Result<Answer> {
    match ask.verb.as_str() {
        "sync" => Answer::of(&net.sync(need(cx)?, &decode(&ask.args)?).await?),
        "explain" => Answer::of(&net.explain(need(cx)?, &decode(&ask.args)?).await?),
        _ => provider(net, ask, cx).await,
    }
}
