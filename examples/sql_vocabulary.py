"""The words the text-to-SQL data is made of, in two vocabularies that share no table and no column.

``TRAINING`` composes column names from modifiers and nouns, so that a model is better off copying
them from the schema than learning them. ``HELD_OUT`` has tables written by hand, with coherent
columns, and values made of other words.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What one split is made of.

    ``tables`` maps a table's name to its columns (empty: any columns). A text column's kind says
    how its values are made, a number column's kind is its range. ``numbered_tables`` is the range
    of n in names such as ``table_name_n``.
    """

    tables: dict[str, tuple[str, ...]]
    text_columns: dict[str, str]
    number_columns: dict[str, tuple[int, int]]
    numbered_tables: tuple[int, int]
    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    places: tuple[str, ...]
    place_suffixes: tuple[str, ...]
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    words: tuple[str, ...]


def _list(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _composed(nouns: dict[str, str], modifiers: str) -> dict[str, str]:
    """Every noun alone and with each modifier before it: ``captain``, ``former_captain``, ..."""
    columns = {}
    for kind, names in nouns.items():
        for noun in _list(names):
            columns[noun] = kind
            for modifier in _list(modifiers):
                columns[f"{modifier}_{noun}"] = kind
    return columns


_TEXT_NOUNS = {
    "person": (
        "captain, player, director, author, winner, manager, coach, driver, artist, owner, "
        "teacher, mayor, editor, founder, singer, candidate, president, rider, producer, guest, "
        "student, doctor, runner, champion, name, person, actor, judge, opponent, member"
    ),
    "place": (
        "city, country, venue, location, region, town, county, stadium, district, port, state, "
        "birthplace, destination, origin, station, village, province, hometown, territory, "
        "address"
    ),
    "thing": (
        "team, club, school, company, product, project, event, award, brand, machine, model, "
        "engine, party, league, college, festival, department, office, network, sponsor, vehicle, "
        "animal, competition, organization, tool, dish, game, group, series, tournament"
    ),
    "title": (
        "title, album, song, book, film, episode, song_title, program, play, show, record, "
        "article, painting, magazine, theme, chapter, report, exhibition"
    ),
    "code": (
        "code, serial, catalog, license, registration, reference, ticket, barcode, flight, room, "
        "version, identifier, unit, batch, plate, part_no"
    ),
    "date": (
        "date, birthday, deadline, start_date, end_date, release_date, air_date, opening, "
        "arrival, departure, founded, dissolved"
    ),
    "word": (
        "status, color, category, type, position, result, language, material, genre, class, "
        "division, nationality, role, format, weather, shape, rating, grade, outcome, surface, "
        "size, party_line, method, kind, season, religion, occupation, subject, field, style"
    ),
}
_NUMBER_NOUNS = {
    "count": (
        "points, goals, wins, losses, laps, rounds, games, seats, floors, votes, medals, books, "
        "rooms, members_count, stars, attempts, tickets, visits, copies, errors, pages, rank, "
        "pick, score, age, draws, assists, caps, starts, weeks, week, round, level, rebounds, "
        "matches, guests"
    ),
    "amount": (
        "price, salary, budget, weight, height, length, distance, population, attendance, area, "
        "sales, cost, revenue, capacity, speed, votes_cast, elevation, depth, prize, views, "
        "width, power, enrollment, income, tax, rent, volume, profit, viewers, quantity"
    ),
    "year": (
        "year, founded_year, built, opened, year_joined, retired, debut, born, year_released, "
        "year_built, established, completed, year_elected, introduced, renewed"
    ),
}
_NUMBER_RANGES = {"count": (1, 60), "amount": (100, 9000), "year": (1900, 2024)}

TRAINING = Vocabulary(
    tables=dict.fromkeys(
        _list(
            "employees, players, races, albums, films, matches, cities, schools, students, orders, "
            "products, customers, flights, books, authors, concerts, teams, events, buildings, "
            "bridges, ships, cars, hotels, patients, courses, songs, elections, districts, "
            "museums, parks, rivers, mountains, satellites, recipes, invoices, projects, "
            "departments, tournaments, stations, trains, artists, paintings, farms, factories, "
            "clubs, festivals, episodes, awards, machines, journals, senators, satellites_list, "
            "game_log, season_results, home_games, race_history, staff_list, sales_record, "
            "city_data, membership"
        ),
        (),
    ),
    text_columns=_composed(_TEXT_NOUNS, "home, former, first, second, last, main, local, current"),
    number_columns={
        name: _NUMBER_RANGES[kind]
        for name, kind in _composed(_NUMBER_NOUNS, "home, career, season, local, final").items()
    },
    numbered_tables=(100, 9999),
    first_names=_list(
        "James, Maria, Robert, Linda, Michael, Sofia, David, Karen, Ahmed, Susan, Thomas, Nadia, "
        "Charles, Lucia, Daniel, Helen, Matteo, Anna, Pablo, Ruth, Viktor, Laura, Kenji, Emily, "
        "Andre, Olga, Simon, Grace, Hugo, Alice, Ivan, Clara, Omar, Julia, Peter, Rosa"
    ),
    last_names=_list(
        "Smith, Garcia, Johnson, Rossi, Brown, Tanaka, Miller, Novak, Davis, Silva, Wilson, Kim, "
        "Anderson, Lopez, Taylor, Schmidt, Moore, Haddad, Jackson, Larsen, Martin, O'Brien, Lee, "
        "Petrov, White, Moreau, Harris, Sato, Clark, Weber, Lewis, Costa, Walker, Jansen, Hall, "
        "Ito"
    ),
    places=_list(
        "Green, Stone, River, North, Oak, Silver, West, Maple, Iron, East, Cedar, Clear, Fair, "
        "High, Long, Mill, New, Old, Pine, Red, Rock, Sand, South, Spring, Summer, White, Wood, "
        "King, Ash"
    ),
    place_suffixes=_list(
        "field, ville, ton, port, ford, burg, bridge, dale, wood, mouth, haven, ham"
    ),
    adjectives=_list(
        "Red, Golden, Royal, National, United, Northern, Blue, Central, Grand, Modern, Silver, "
        "Swift, Global, Summer, Wild, Green, Hidden, Silent, Broken, Early, Famous, Lucky, Little, "
        "Second, Open, Bright, Western, Lost, Heavy, Young, Classic, Urban, Western, Proud, "
        "Simple, Quick"
    ),
    nouns=_list(
        "Tigers, Harbor, Cup, Rangers, Motors, River, Academy, Garden, Eagles, Trophy, Studio, "
        "Market, Lions, Bridge, Union, Wolves, Road, Institute, Mountain, Stars, Works, Story, "
        "Hawks, House, Summer, Dream, Song, Bears, City, Night, Letter, Engine, Sharks, Forest, "
        "Games, Light"
    ),
    words=_list(
        "active, closed, red, blue, green, black, French, Spanish, German, Italian, won, lost, "
        "drawn, wood, steel, glass, jazz, rock, drama, comedy, defender, forward, goalkeeper, "
        "senior, junior, retired, pending, gold, silver, bronze, round, square, clay, grass, hard, "
        "Catholic, Democratic, Republican, Canadian, Japanese, engineer, lawyer, nurse, small, "
        "large, medium, digital, paper, history, physics, cloudy, sunny, rainy, knockout, "
        "decision, winter, spring, first, third"
    ),
)

HELD_OUT = Vocabulary(
    tables={
        "airfields": ("icao", "airport", "runway_length", "traffic_controller"),
        "papal_conclave": ("elector", "cardinalate_title", "consistory", "ballots"),
        "vineyards": ("grape", "winemaker", "bottles", "hectares", "appellation", "soil"),
        "telescopes": ("observatory", "mirror_diameter", "astronomer", "mount", "first_light"),
        "lighthouses": ("lamp", "keeper", "tower_height", "coastline", "year_lit", "flash_pattern"),
        "shipwrecks": ("vessel", "cargo", "fathoms", "year_sunk", "skipper", "hull"),
        "orchards": ("fruit", "grower", "trees", "crop", "valley"),
        "chess_openings": ("grandmaster", "gambit", "elo", "moves", "tempo"),
        "tram_lines": ("tram", "terminus", "stops", "riders", "gauge", "depot"),
        "bakeries": ("loaf", "baker", "flour", "ovens", "calories", "quarter"),
        "volcanoes": ("volcano", "crater_depth", "eruptions", "last_eruption", "lava", "island"),
        "libraries": ("librarian", "shelf_mark", "volumes", "borrowers", "reading_hall"),
        "operas": ("opera", "composer", "soprano", "acts", "premiere", "tessitura"),
        "beehives": ("beekeeper", "honey_yield", "queen", "frames", "meadow", "temperament"),
        "expeditions": ("explorer", "summit", "sherpas", "camps", "base_camp", "route_grade"),
        "pharmacies": ("pharmacist", "remedy", "doses", "dosage_form", "unit_price"),
    },
    text_columns={
        "icao": "code",
        "airport": "place",
        "traffic_controller": "person",
        "elector": "person",
        "cardinalate_title": "title",
        "consistory": "date",
        "grape": "word",
        "winemaker": "person",
        "appellation": "place",
        "soil": "word",
        "observatory": "place",
        "astronomer": "person",
        "mount": "word",
        "first_light": "date",
        "lamp": "word",
        "keeper": "person",
        "coastline": "place",
        "flash_pattern": "code",
        "vessel": "title",
        "cargo": "word",
        "skipper": "person",
        "hull": "word",
        "fruit": "word",
        "grower": "person",
        "valley": "place",
        "grandmaster": "person",
        "gambit": "title",
        "tempo": "word",
        "tram": "code",
        "terminus": "place",
        "depot": "place",
        "loaf": "thing",
        "baker": "person",
        "flour": "word",
        "quarter": "place",
        "volcano": "place",
        "lava": "word",
        "island": "place",
        "librarian": "person",
        "shelf_mark": "code",
        "reading_hall": "thing",
        "opera": "title",
        "composer": "person",
        "soprano": "person",
        "premiere": "date",
        "tessitura": "word",
        "beekeeper": "person",
        "queen": "code",
        "meadow": "place",
        "temperament": "word",
        "explorer": "person",
        "summit": "place",
        "base_camp": "place",
        "route_grade": "word",
        "pharmacist": "person",
        "remedy": "thing",
        "dosage_form": "word",
    },
    number_columns={
        "runway_length": (600, 4500),
        "ballots": (1, 40),
        "bottles": (100, 9000),
        "hectares": (1, 90),
        "mirror_diameter": (20, 900),
        "tower_height": (8, 80),
        "year_lit": (1750, 1990),
        "fathoms": (3, 400),
        "year_sunk": (1600, 1990),
        "trees": (20, 900),
        "crop": (200, 9500),
        "elo": (1800, 2850),
        "moves": (8, 90),
        "stops": (5, 60),
        "riders": (500, 9900),
        "gauge": (600, 1676),
        "ovens": (1, 40),
        "calories": (80, 900),
        "crater_depth": (50, 3000),
        "eruptions": (1, 60),
        "last_eruption": (1500, 2020),
        "volumes": (500, 9900),
        "borrowers": (30, 4000),
        "acts": (1, 30),
        "honey_yield": (1, 60),
        "frames": (5, 40),
        "sherpas": (1, 50),
        "camps": (1, 40),
        "doses": (5, 200),
        "unit_price": (50, 4000),
    },
    numbered_tables=(1, 99),
    first_names=_list(
        "Anchero, Beatrix, Cornelius, Dagmar, Edmund, Fatima, Gustav, Hortense, Igor, Jadwiga, "
        "Kwame, Leopold, Mireille, Nikolai, Ottoline, Priya, Quentin, Rosalind, Sven, Tamsin, "
        "Umberto, Wilhelmina"
    ),
    last_names=_list(
        "Pantaleone, Abernathy, Bergstrom, Castellano, D'Arcy, Eberhardt, Fitzroy, Grimaldi, "
        "Holloway, Iwasaki, Jarvinen, Kowalczyk, Lindqvist, Mbeki, Nakagawa, Okafor, Pemberton, "
        "Rasmussen, Thackeray"
    ),
    places=_list(
        "Lilong, Brack, Crom, Dun, Eller, Fen, Glen, Harrow, Inver, Kirk, Lang, Morven, Thorn, "
        "Ulver, Wester, Yarrow, Zell, Pem, Quill, Raven"
    ),
    place_suffixes=_list("we, wick, stead, holm, mere, thorpe, combe, leigh, minster, worth"),
    adjectives=_list(
        "Crimson, Ancient, Velvet, Drowsy, Imperial, Wandering, Copper, Frozen, Gentle, Hollow, "
        "Marble, Restless, Scarlet, Tender, Twilight, Coastal, Amber, Noble"
    ),
    nouns=_list(
        "Lantern, Sparrow, Compass, Orchid, Anchor, Falcon, Mirror, Pavilion, Tempest, Cottage, "
        "Violin, Thistle, Caravan, Cathedral, Meridian, Willow, Pilgrim, Beacon"
    ),
    words=_list(
        "granite, basalt, limestone, copper, walnut, barley, rye, amber, ivory, scarlet, gentle, "
        "fierce, Merlot, Riesling, plum, quince, apricot, brisk, solemn, tablet, syrup, ointment, "
        "oil, electric, equatorial, timber, spices, porcelain, coal, lyric, dramatic, easy, "
        "severe, alpine"
    ),
)
