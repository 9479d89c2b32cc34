//! [`HostInventory`] and [`Power`] over the wire.

use std::time::Duration;

use async_trait::async_trait;

use super::client::RemotePart;
use super::frame::Ask;
use super::frame::decode;
use super::server::Answer;
use super::server::need;
use super::server::provider;
use crate::Id;
use crate::Result;
use crate::model::Host;
use crate::spi::Ctx;
use crate::spi::Stamp;
use crate::spi::host::HostFacts;
use crate::spi::host::HostInventory;
use crate::spi::host::Power;

#[async_trait]
impl HostInventory for RemotePart {
    async fn facts(&self, cx: &Ctx) -> Result<HostFacts> {
        self.call("facts", cx, &()).await
    }

    async fn lease(&self, cx: &Ctx, ttl: Duration) -> Result<Stamp> {
        self.call("lease", cx, &ttl).await
    }
}

pub(super) async fn answer_inventory(
    inventory: &dyn HostInventory,
    ask: &Ask,
    cx: Option<&Ctx>,
) -> Result<Answer> {
    match ask.verb.as_str() {
        "facts" => Answer::of(&inventory.facts(need(cx)?).await?),
        "lease" => Answer::of(&inventory.lease(need(cx)?, decode(&ask.args)?).await?),
        _ => provider(inventory, ask, cx).await,
    }
}

#[async_trait]
impl Power for RemotePart {
    async fn is_on(&self, cx: &Ctx, host: Id<Host>) -> Result<bool> {
        self.call("is_on", cx, &host).await
    }

    async fn set(&self, cx: &Ctx, host: Id<Host>, on: bool) -> Result<()> {
        self.call("set", cx, &(host, on)).await
    }
}

pub(super) async fn answer_power(power: &dyn Power, ask: &Ask, cx: Option<&Ctx>) -> Result<Answer> {
    match ask.verb.as_str() {
        "is_on" => Answer::of(&power.is_on(need(cx)?, decode(&ask.args)?).await?),
        "set" => {
            let (host, on) = decode(&ask.args)?;
            Answer::of(&power.set(need(cx)?, host, on).await?)
        }
        _ => provider(power, ask, cx).await,
    }
}
